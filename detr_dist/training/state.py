"""Where a run stands: the few numbers from which everything else follows."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Self

from pydantic import PlainSerializer

from detr_dist.config import Config
from detr_dist.redaction import redact_value


@dataclass
class TrainState:
    """Progress of a run. All randomness is a function of the seed and these numbers."""

    step: int = 0
    """Optimizer steps done."""
    closed_step: int = 0
    """Steps done at the last epoch's end whose evaluation, if one was due, is behind us."""
    best_map: float | None = None
    """Highest `val_map` of any evaluation so far."""
    best_step: int | None = None
    """Optimizer step of that evaluation."""
    evaluations_since_best: int = 0
    """Evaluations in a row that did not raise `best_map`: what early stopping counts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""

    def without_best(self) -> Self:
        """Return the same progress, as if no evaluation had been: on other data scores cannot be compared."""
        return replace(self, best_map=None, best_step=None, evaluations_since_best=0)

    def evaluated(self, metrics: dict[str, float]) -> bool:
        """Take in an evaluation of the current step; says whether it is the best so far."""
        self.metrics = metrics
        val_map = metrics.get("val_map", 0.0)
        if self.best_map is None or val_map > self.best_map:
            self.best_map, self.best_step, self.evaluations_since_best = val_map, self.step, 0
            return True
        self.evaluations_since_best += 1
        return False


@dataclass(frozen=True)
class RunFacts:
    """What a run depends on beside its progress; a resumed run is compared with it."""

    config: Config
    class_names: list[str]
    num_train_images: int
    data_sha256: str
    """Of the training annotations: in another order, or with other boxes, they are other data."""
    num_processes: int
    global_batch_size: int
    init_from: Annotated[str, PlainSerializer(redact_value, when_used="json")] | None
    """Where the first weights came from, if not from the configuration."""
    mlflow_run_id: str | None
    versions: dict[str, str]
    zero_stage: int = 0
    """Of DeepSpeed; 0 without it."""
    val_data_sha256: str | None = None
    """Of the validation annotations; None in checkpoints of earlier versions."""
