"""Delivers what a run could not, once it has ended."""

import time
from pathlib import Path

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.tracking.delivery import Delivery, one_line
from detr_dist.tracking.mlflow import open_client, say
from detr_dist.tracking.outbox import OutboxReader, locked

# Attempts at a server that does not answer, and the seconds between them.
_ATTEMPTS, _PAUSE_S = 5, 2.0


def sync(output_dir: Path) -> None:
    """Deliver what is left in the outboxes of an output folder, those of its earlier runs as well.

    Raises:
        UsageError: there are none.
        DataError: a run that is still going on delivers one of them.
        DetrDistError: MLflow cannot be reached; nothing is lost.
    """
    folders = [path.parent for path in sorted(output_dir.glob("**/outbox/*/run.json"))]
    if not folders:
        raise UsageError(f"{output_dir}: has no outbox; give the --output-dir of a run that MLflow tracks")
    for folder in folders:
        with locked(folder):
            reader = OutboxReader(folder)
            delivery = Delivery(reader, open_client(reader.address.tracking_uri), say)
            num_records = delivery.num_left
            _deliver(delivery, reader)
        say(f"{folder}: {num_records} records delivered to MLflow run {reader.address.run_id}")


def _deliver(delivery: Delivery, reader: OutboxReader) -> None:
    attempt = 0
    while delivery.num_left:
        try:
            delivery.work()
            attempt = 0
        except Exception as error:  # each kind of store raises its own
            attempt += 1
            if attempt == _ATTEMPTS:
                raise DetrDistError(
                    f"{reader.folder}: {delivery.num_left} records are left, because MLflow at "
                    f"{reader.address.tracking_uri} cannot be reached ({one_line(error)}); nothing is lost, "
                    f"try again"
                ) from error
            time.sleep(_PAUSE_S)
