"""A run in MLflow, tracked through `MlflowClient` from the main process only."""

import getpass
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detr_dist.config import LoggingConfig
from detr_dist.data.coco import CocoData
from detr_dist.errors import UsageError
from detr_dist.redaction import redact, redact_value
from detr_dist.text import one_line
from detr_dist.tracking.delivery import Delivery, DeliveryThread
from detr_dist.tracking.outbox import Address, Outbox, OutboxReader
from detr_dist.tracking.pages import prepare_experiment, ways_to_see
from detr_dist.tracking.store import (
    acceptable,
    close_connections,
    find_or_make_experiment,
    is_away,
    open_client,
    patience,
    refuse_deleted,
    unless_busy,
)
from detr_dist.tracking.tracker import PATIENCE_S, OwnTracker, Status
from detr_dist.tracking.uris import absolute_uri, local_location

# Seconds that a request without an upload may take before it counts as failed.
_TIMEOUT_S = 20

# Characters of a run's name in MLflow's databases.
_MAX_NAME_LENGTH = 250

_logger = logging.getLogger(__name__)


class MLflowTracker(OwnTracker):
    """One MLflow run. Everything is logged to an outbox on disk, and delivered to MLflow in the background.

    Call `open` before logging. A new run needs its server; a run that is resumed in its own store (`run_id`
    at `known_uri`) does not, and delivers later.

    Raises:
        UsageError: the tracking URI cannot be used.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        run_id: str | None = None,
        known_uri: str | None = None,
        default_name: str | None = None,
        table_metrics: Sequence[str] = ("val_map",),
    ) -> None:
        """Start a run, or resume `run_id`.

        Args:
            config: Store, experiment and name of the run.
            run_id: The run to resume.
            known_uri: The store that it was tracked in.
            default_name: Name of a new run if `config` has none.
            table_metrics: Columns of the view of the run table, the one to sort by first.
        """
        self.uri = config.mlflow_tracking_uri
        self.client = open_client(self.uri)
        self._thread: DeliveryThread | None = None
        self._experiment_id: str | None
        self._view: str | None = None
        try:
            with patience(_TIMEOUT_S):
                if run_id is None:
                    self.run_id, self._experiment_id = self._start(config, default_name)
                else:
                    self.run_id = run_id
                    is_known = known_uri is not None and redact(known_uri) == redact(self.uri)
                    self._experiment_id = self._find(is_known=is_known)
                if self._experiment_id is not None:
                    self._view = prepare_experiment(self.client, self._experiment_id, table_metrics)
        except UsageError:
            raise
        except Exception as error:  # each kind of store raises its own types
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: cannot start a run there ({one_line(error)}); "
                "correct it, or set logging.mlflow=false"
            ) from error

    def _start(self, config: LoggingConfig, default_name: str | None) -> tuple[str, str]:
        """Return the ids of a new run and of its experiment."""
        experiment_id = find_or_make_experiment(self.client, config.mlflow_experiment_name)
        tags = {name: acceptable(value) for name, value in _source_tags().items()}
        run_name = config.mlflow_run_name or (default_name and acceptable(default_name, _MAX_NAME_LENGTH))
        run = unless_busy(lambda: self.client.create_run(experiment_id, run_name=run_name, tags=tags))
        return str(run.info.run_id), experiment_id

    def _find(self, *, is_known: bool) -> str | None:
        """Check that the run can be resumed; return its experiment, or None while the server is away."""
        try:
            run = unless_busy(lambda: self.client.get_run(self.run_id))
        except Exception as error:  # each kind of store raises its own types
            if is_known and is_away(error):
                _logger.warning(
                    f"MLflow at {self.uri} cannot be reached ({one_line(error)}); run {self.run_id} "
                    "continues all the same, and everything logged is delivered later"
                )
                return None
            raise UsageError(
                f"logging.mlflow_tracking_uri {self.uri}: MLflow run {self.run_id}, to which the checkpoint "
                f"belongs, is not available there ({one_line(error)}); start its server, give the URI it was "
                "tracked at, or set logging.mlflow=false"
            ) from error
        refuse_deleted(unless_busy(lambda: self.client.get_experiment(run.info.experiment_id)))
        if run.info.lifecycle_stage != "active":
            raise UsageError(
                f"MLflow run {self.run_id}, to which the checkpoint belongs, was deleted; restore it with "
                f"`mlflow runs restore --run-id {self.run_id}`, or set logging.mlflow=false"
            )
        return str(run.info.experiment_id)

    def ways_to_see(self) -> list[str]:
        """Return lines with the address or command of MLflow's UI, and links to the run and to all runs."""
        return ways_to_see(self.uri, self._experiment_id, self.run_id, self._view)

    def open(self, folder: Path) -> None:
        """Start to deliver from the outbox in `folder`, first the records of earlier processes."""
        self.outbox = Outbox(folder / self.run_id, Address(absolute_uri(self.uri), self.run_id))
        self._thread = DeliveryThread(Delivery(OutboxReader(self.outbox.folder), self.client))

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the params that the run does not have yet; MLflow refuses to change params."""
        self.outbox.append("params", values={name: str(value) for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue metrics, with the current time."""
        values = {name: float(value) for name, value in metrics.items()}
        self.outbox.append("metrics", step=step, at_ms=int(time.time() * 1000), values=values)

    def log_folder(self, folder: Path, artifact_path: str, *, last: str | None = None) -> None:
        """Queue hard links to the files of `folder`, of which `last` is uploaded after all others."""
        self.outbox.append_folder(folder, artifact_path, last=last)

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        """Queue a copy of a file, which may change afterwards."""
        self.outbox.append_file(path, artifact_path)

    def keep_newest(self, parent: str, newest: int, keep: int) -> None:
        """Queue the deletion of all but the newest `keep` folders `parent`/epoch_<N>, N <= `newest`."""
        self.outbox.append_retention(parent, newest, keep)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Queue tags of the run."""
        self.outbox.append("tags", values={**tags})

    def note_resume(self, step: int, changes: Sequence[str]) -> None:
        """Set the run's status to running, and tag the step it is resumed at and the changed settings."""
        self.outbox.append("resumption", step=step, changes=[*changes])

    def log_datasets(self, datasets: Mapping[str, CocoData]) -> None:
        """Log the data sets of the run, by their use (`train`, `validation`)."""
        for context, data in datasets.items():
            self.outbox.append(
                "dataset",
                context=context,
                name=data.annotations_path.parent.name,
                digest=data.fingerprint()[:32],
                source=local_location(data.annotations_path),
                profile={"num_images": len(data), "num_boxes": len(data.box_classes)},
            )

    def register_model(self, name: str) -> None:
        """Register the run's model as a new version of `name`, with the alias `best`."""
        self.outbox.append("registration", name=name)

    def close(self, status: Status, error: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        """Set the run's status after everything is delivered; wait at most `patience_s` seconds for that."""
        if self._thread is None:
            with patience(_TIMEOUT_S):
                if error is not None:
                    self.client.set_tag(self.run_id, "error", acceptable(redact(error)))
                self.client.set_terminated(self.run_id, status)
            return
        self.outbox.append("status", status=status, error=error)
        num_left = self._thread.end(patience_s=patience_s)
        folder = self.outbox.folder
        self.outbox.close()
        close_connections(self.client)
        if num_left:
            _logger.warning(
                f"{num_left} records are not in MLflow yet ({self.uri}); they are kept in {folder}, and "
                f"`detr-dist sync {folder.parent.parent}` delivers them"
            )


def _source_tags() -> dict[str, str]:
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "launch_command": shlex.join([sys.executable, *redact_value(sys.argv)]),
    }
    try:
        tags["mlflow.user"] = getpass.getuser()
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        tags["mlflow.source.git.commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError, KeyError):
        pass  # no git, no repository, no such user: nothing to record
    return tags
