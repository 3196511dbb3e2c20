"""Delivers what a run could not, once it has ended."""

import logging
import time
from pathlib import Path

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.storage import locked
from detr_dist.text import one_line
from detr_dist.tracking.delivery import Delivery
from detr_dist.tracking.outbox import OutboxReader
from detr_dist.tracking.store import open_client, patience

# Attempts at a server that does not answer, and the seconds between them.
_MAX_ATTEMPTS, _PAUSE_S = 5, 2.0

# A request that takes longer has failed; an upload includes what the server does with it.
_TIMEOUT_S = 120

_logger = logging.getLogger(__name__)


def sync(output_dir: Path) -> None:
    """Deliver what is left in the outboxes of an output folder, those of its earlier runs as well.

    Raises:
        UsageError: there are none.
        DataError: a run that is still at work there delivers them.
        DetrDistError: MLflow cannot be reached for some; nothing is lost, and the others are delivered.
    """
    # What is newer goes over what is older.
    patterns = ("earlier_runs/*/outbox/*/run.json", "outbox/*/run.json")
    folders = [path.parent for pattern in patterns for path in sorted(output_dir.glob(pattern))]
    if not folders:
        raise UsageError(f"{output_dir}: has no outbox; give the --output-dir of a run that MLflow tracks")
    failures = []
    with locked(output_dir), patience(_TIMEOUT_S):
        for folder in folders:
            try:
                _deliver_all(OutboxReader(folder))
            except DetrDistError as failure:
                failures.append(str(failure))
    if failures:
        raise DetrDistError("\n".join(failures))


def _deliver_all(reader: OutboxReader) -> None:
    uri, run_id = reader.address.tracking_uri, reader.address.run_id
    delivery = Delivery(reader, open_client(uri))
    num_records = delivery.num_left
    num_failures = 0
    while delivery.num_left:
        try:
            delivery.work()
            num_failures = 0
        except Exception as error:  # each kind of store raises its own
            num_failures += 1
            if num_failures == _MAX_ATTEMPTS:
                raise DetrDistError(
                    f"{reader.folder}: {delivery.num_left} records are left, because MLflow at {uri} cannot "
                    f"be reached ({one_line(error)}); nothing is lost, try again"
                ) from error
            time.sleep(_PAUSE_S)
    _logger.info(f"{reader.folder}: {num_records} records delivered to MLflow run {run_id}")
