"""Delivery of an outbox's records to MLflow, each once, through outages, during a run or afterwards."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from detr_dist.errors import DetrDistError, UsageError
from detr_dist.storage import locked
from detr_dist.text import one_line, shorten, value_of
from detr_dist.tracking.outbox import OutboxReader, Record
from detr_dist.tracking.run_actions import RunActions
from detr_dist.tracking.store import (
    acceptable,
    can_link_data_sets,
    is_away,
    is_refusal,
    open_client,
    patience,
)

# Limits of MLflow's API.
_MAX_VALUES = {"metrics": 1000, "params": 100, "tags": 100}
_MAX_PARAM_LENGTH = 6000

# Values are small and are delivered first; folders and the run's status follow after all earlier values.
_VALUES, _FOLDERS = "values", "folders"

# Records that a server may refuse permanently, for lack of a permission or a method; the rest must not wait.
_DISPENSABLE = {"dataset", "image", "model", "note", "registration", "retention", "table"}

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_LOOK_EVERY_S = 0.5

# Attempts of `sync` at a server that does not answer, and the seconds between them.
_MAX_ATTEMPTS, _PAUSE_S = 5, 2.0

# Seconds that a request may take before it counts as failed; an upload includes its processing by the server.
_TIMEOUT_S = 120

_logger = logging.getLogger(__name__)


class Delivery:
    """Delivers the records of an outbox, a batch at each call of `work`.

    It asks the server what it has already, so that nothing is logged twice after a crash or a lost answer.
    For use by one thread.
    """

    def __init__(self, reader: OutboxReader, client: MlflowClient) -> None:
        self._reader = reader
        self._client = client
        self._run_id = reader.address.run_id
        self._logged_until: dict[str, int] | None = None  # by metric; None: ask the server
        self._known_params: set[str] = set()
        self._refused: set[str] = set()
        self._can_link_data_sets: bool | None = None  # None: ask the server
        self._lacks_models = False  # because the server is too old, or does not permit them
        self._refused_kinds: set[str] = set()
        self._actions = RunActions(client, self._run_id)

    @property
    def num_left(self) -> int:
        """Number of records that are still to be delivered."""
        return self._reader.num_left(_VALUES, _FOLDERS)

    def work(self) -> bool:
        """Deliver a batch of values, then at most one folder; return whether there was anything to do.

        Raises:
            Exception: of many types, while MLflow's server cannot be reached; call again later.
        """
        try:
            delivered_values = self._deliver_values()
            return self._deliver_other() or delivered_values
        except Exception:
            self._logged_until = self._can_link_data_sets = None
            self._actions.models.forget()
            raise

    def _deliver_values(self) -> bool:
        records = list(_first_batch(self._reader.records(_VALUES)))
        if not records:
            return False
        try:
            self._log(records)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            self._log_what_is_accepted(records, error)
        self._reader.advance(_VALUES, records[-1].end)
        return True

    def _log(self, records: Iterable[Record]) -> None:
        if self._logged_until is None:
            run = self._client.get_run(self._run_id)
            # The latest entry of a metric is the one with its highest step.
            self._logged_until = {metric.key: metric.step for metric in run.to_proto().data.metrics}
            self._known_params = set(run.data.params)
        logged_until = dict(self._logged_until)
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for kind, content, _ in records:
            if kind == "metrics":
                step = content["step"]
                new = {k: v for k, v in content["values"].items() if step > logged_until.get(k, -1)}
                linked = self._links(content, step) if new else {}
                metrics += [Metric(k, v, content["at_ms"], step, **linked) for k, v in new.items()]
                logged_until |= dict.fromkeys(new, step)
            elif kind == "params":  # MLflow refuses to change one
                params = {k: v for k, v in content["values"].items() if k not in self._known_params} | params
            elif kind == "tags":
                tags |= content["values"]
        if metrics or params or tags:
            self._client.log_batch(
                self._run_id,
                metrics=metrics,
                params=[Param(name, acceptable(value, _MAX_PARAM_LENGTH)) for name, value in params.items()],
                tags=[RunTag(name, acceptable(value)) for name, value in tags.items()],
            )
        self._logged_until = logged_until
        self._known_params |= params.keys()

    def _links(self, content: dict[str, Any], step: int) -> dict[str, str]:
        """Return the LoggedModel and the data set that metrics belong to."""
        if "epoch" not in content or self._lacks_models:
            return {}
        try:
            links = {"model_id": self._actions.models.find_or_create(content["epoch"], step)}
        except (MlflowException, NotImplementedError) as error:
            if isinstance(error, MlflowException) and is_away(error):
                raise
            self._lacks_models = True
            self._refused_kinds.add("model")
            _logger.warning(
                f"MLflow refuses the models of epochs as LoggedModels ({one_line(error)}); they are "
                "artifacts of the run"
            )
            return {}
        if "dataset" in content:
            if self._can_link_data_sets is None:
                self._can_link_data_sets = can_link_data_sets(self._client)
            if self._can_link_data_sets:
                links["dataset_name"], links["dataset_digest"] = content["dataset"]
        return links

    def _log_what_is_accepted(self, records: Iterable[Record], refusal: MlflowException) -> None:
        """Log everything that MLflow accepts, and warn once of the rest."""
        values = [
            record._replace(content=record.content | {"values": {name: value}})
            for record in records
            if record.kind in _MAX_VALUES
            for name, value in record.content["values"].items()
        ]
        is_deleted = self._client.get_run(self._run_id).info.lifecycle_stage != "active"
        refused = values if is_deleted else self._log_by_halves(values)
        names = {name: None for record in refused for name in record.content["values"]}
        new = [name for name in names if name not in self._refused]
        self._refused.update(new)
        if new:
            listed = shorten(", ".join(map(repr, new)), 2000)
            _logger.warning(f"MLflow refuses {listed} ({one_line(refusal)}); all else is logged")

    def _log_by_halves(self, values: list[Record]) -> list[Record]:
        """Log values by bisection if some are refused; return the refused ones."""
        self._logged_until = None  # values before the refused one may be logged
        try:
            self._log(values)
            return []
        except MlflowException as error:
            if not is_refusal(error):
                raise
        middle = len(values) // 2
        if middle == 0:
            return values
        return self._log_by_halves(values[:middle]) + self._log_by_halves(values[middle:])

    def _deliver_other(self) -> bool:
        """Deliver the next record that is not a value, if all values before it are delivered."""
        for kind, content, end in self._reader.records(_FOLDERS, limit=self._reader.position(_VALUES)):
            if kind in _MAX_VALUES:
                continue
            self._act(kind, content)
            self._reader.advance(_FOLDERS, end)
            return True
        self._reader.advance(_FOLDERS, self._reader.position(_VALUES))
        return False

    def _act(self, kind: str, content: dict[str, Any]) -> None:
        if kind not in self._actions.of_files:
            self._unless_refused(kind, content, partial(self._actions.others[kind], **content))
            return
        with self._reader.uploading(content.pop("name")) as folder:
            if folder is not None:
                self._unless_refused(kind, content, partial(self._actions.of_files[kind], folder, **content))

    def _unless_refused(self, kind: str, content: dict[str, Any], act: Callable[[], None]) -> None:
        """Call `act`; if the server permanently refuses what is dispensable, warn, once for each kind."""
        try:
            act()
        except (MlflowException, NotImplementedError) as error:
            if kind not in _DISPENSABLE or (isinstance(error, MlflowException) and is_away(error)):
                raise
            if kind not in self._refused_kinds:
                self._refused_kinds.add(kind)
                _logger.warning(f"MLflow refuses {kind} {value_of(content, 200)} ({one_line(error)})")


class DeliveryThread:
    """Delivers in the background, and retries for as long as the server cannot be reached.

    It polls for new records: waking it for each record would cost the training thread more than writing the
    record. While it is running, `patience` applies to MLflow's requests.
    """

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._ending = threading.Event()
        self._give_up_at = math.inf
        self._is_away = False
        self._time_outs = ExitStack()
        self._time_outs.enter_context(patience(_TIMEOUT_S))
        self._thread = threading.Thread(target=self._run, name="mlflow-delivery", daemon=True)
        self._thread.start()

    def end(self, *, patience_s: float) -> int:
        """Wait at most `patience_s` seconds until all is delivered; return the number of records left."""
        self._give_up_at = time.monotonic() + patience_s
        self._ending.set()
        self._thread.join(patience_s + 1.0)
        if not self._thread.is_alive():  # a living thread is in a request, and may still read them
            self._time_outs.close()
        return self._delivery.num_left

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while time.monotonic() < self._give_up_at:
            try:
                worked = self._delivery.work()
            except Exception as error:  # each kind of store raises its own types
                self._report(error)
                if self._ending.wait(pause_s):
                    time.sleep(_FIRST_PAUSE_S)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            self._report(None)
            pause_s = _FIRST_PAUSE_S
            if not worked and self._ending.wait(_LOOK_EVERY_S) and not self._delivery.num_left:
                return

    def _report(self, error: Exception | None) -> None:
        """Report once that the server cannot be reached, and once that it can be reached again."""
        if self._is_away == (error is not None):
            return
        self._is_away = error is not None
        if self._is_away:
            _logger.warning(
                f"MLflow cannot be reached ({one_line(error)}); training continues, and everything logged "
                "is kept and delivered later"
            )
        else:
            _logger.info("MLflow can be reached again")


def sync(output_dir: Path) -> None:
    """Deliver the remaining records in the outboxes of an output folder, including earlier runs.

    Raises:
        UsageError: there are no outboxes.
        DataError: a run is still active in the folder, and delivers them itself.
        DetrDistError: MLflow cannot be reached for some; nothing is lost, and the others are delivered.
    """
    # Older runs first, so that newer values win.
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
        except Exception as error:  # each kind of store raises its own types
            num_failures += 1
            if num_failures == _MAX_ATTEMPTS:
                raise DetrDistError(
                    f"{reader.folder}: {delivery.num_left} records are left, because MLflow at {uri} cannot "
                    f"be reached ({one_line(error)}); nothing is lost, try again"
                ) from error
            time.sleep(_PAUSE_S)
    _logger.info(f"{reader.folder}: {num_records} records delivered to MLflow run {run_id}")


def _first_batch(records: Iterable[Record]) -> Iterator[Record]:
    """Yield as many values as MLflow accepts in one request."""
    room = dict(_MAX_VALUES)
    for number, record in enumerate(records):
        if record.kind in room:
            room[record.kind] -= len(record.content["values"])
            if room[record.kind] < 0 and number > 0:  # the client splits a single record that is too large
                return
        yield record
