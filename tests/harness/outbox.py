"""An outbox with the MLflow run that it belongs to."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlflow import MlflowClient

from detr_dist.tracking.delivery import Delivery
from detr_dist.tracking.outbox import Address, Outbox, OutboxReader


@dataclass
class Sender:
    """Outbox, and the MLflow run that it belongs to."""

    outbox: Outbox
    client: MlflowClient
    run_id: str
    messages: list[str] = field(default_factory=list)
    clock: Iterator[int] = field(default_factory=lambda: itertools.count(1_700_000_000_000))

    def log(self, step: int, **values: float) -> None:
        """Record metrics with their own timestamp, as a run does."""
        self.outbox.append("metrics", step=step, at_ms=next(self.clock), values=values)

    def delivery(self, client: MlflowClient | None = None) -> Delivery:
        """Return a delivery like that of a new process."""
        return Delivery(OutboxReader(self.outbox.folder), client or self.client)

    def deliver(self, client: MlflowClient | None = None) -> None:
        delivery = self.delivery(client)
        for _ in range(100):
            if not delivery.work():
                break
        assert delivery.num_left == 0

    def history(self, metric: str) -> list[tuple[int, float]]:
        return sorted(
            (entry.step, entry.value) for entry in self.client.get_metric_history(self.run_id, metric)
        )

    @property
    def run(self) -> Any:
        return self.client.get_run(self.run_id)

    @property
    def artifacts_dir(self) -> Path:
        return Path(urlparse(self.run.info.artifact_uri).path)

    @property
    def cursors_path(self) -> Path:
        return self.outbox.folder / "delivered.json"

    @property
    def outbox_uri(self) -> str:
        """Return the tracking URI of the outbox."""
        return OutboxReader(self.outbox.folder).address.tracking_uri

    def for_run(self, run_id: str, folder: Path) -> "Sender":
        """Return the same for another run of the store."""
        return Sender(Outbox(folder, Address(self.outbox_uri, run_id)), self.client, run_id)
