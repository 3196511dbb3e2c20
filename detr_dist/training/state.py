"""Where a run stands: the few numbers from which everything else follows."""

from dataclasses import dataclass

from detr_dist.data.sampling import StepPlan


@dataclass
class TrainState:
    """Progress of a run. All randomness is a function of the seed and these numbers."""

    step: int = 0
    """Optimizer steps done."""
    best_map: float | None = None
    """Highest `val_map` of any evaluation so far."""
    best_step: int | None = None
    """Optimizer step of that evaluation."""

    def epoch(self, plan: StepPlan) -> int:
        """Epochs begun and finished, counted from 0: the epoch that the next step belongs to."""
        return self.step // plan.steps_per_epoch
