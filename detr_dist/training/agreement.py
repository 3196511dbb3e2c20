"""What all processes must know of each other at an optimizer step: one exchange of a few host numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from detr_dist.data.batching import Batch
from detr_dist.distributed import HostGroup
from detr_dist.errors import TrainingError
from detr_dist.models.criterion import StepCounts


class Agreed(NamedTuple):
    counts: StepCounts
    """Boxes and images of the optimizer step over all processes: what the losses are divided by."""
    canvas_hw: tuple[int, int]
    """Height and width to which every image of the step is padded. A convolution sees the padding at an
    image's border, so with a canvas per micro-batch the loss would depend on how the step is split over
    processes."""


class StepAgreement:
    """Sums and checks over all processes, once per optimizer step.

    Whether the predictions of a step were finite is known on the host only after its forward passes; it
    travels with the next exchange, so that no step waits just to check. Nothing may be saved before `check`.
    """

    def __init__(self, host: HostGroup) -> None:
        self._host = host
        self._finite = True
        self._image_ids: list[int] = []

    def report(self, *, finite: bool) -> None:
        """Note whether a micro-batch of the current step had finite predictions. Local."""
        self._finite = self._finite and finite

    def next_step(self, step: int, group: Sequence[Batch]) -> Agreed:
        """Agree on optimizer step `step` (from 0), whose micro-batches on this process are `group`.

        Collective.

        Raises:
            TrainingError: on all processes, when the previous step was not finite on any of them.
        """
        rows = self._host.gather_rows(
            [
                sum(sum(batch.num_boxes) for batch in group),
                sum(len(batch.image_ids) for batch in group),
                max((batch.images.shape[-2] for batch in group), default=0),
                max((batch.images.shape[-1] for batch in group), default=0),
                float(self._finite),
            ]
        )
        boxes, images, heights, widths, finite = zip(*rows, strict=True)
        if not all(finite):
            self.stop(step, [process for process, ok in enumerate(finite) if not ok])
        self._image_ids = [image_id for batch in group for image_id in batch.image_ids]
        return Agreed(StepCounts(sum(boxes), sum(images)), (int(max(heights)), int(max(widths))))

    def check(self, step: int) -> None:
        """Make sure that all of the `step` steps so far were finite. Collective; raises like `next_step`."""
        self.next_step(step, ())

    def stop(self, step: int, processes: Sequence[int]) -> None:
        """Raise for a loss that was not finite in the last of `step` steps on these processes.

        Collective.
        """
        image_ids = self._host.all_gather_objects(self._image_ids)
        where = "; ".join(f"process {process}, image ids {image_ids[process]}" for process in processes)
        raise TrainingError(
            f"the loss of step {step} is not finite ({where}); look at these images and their boxes, lower "
            "training.learning_rate, set training.gradient_clip, or use bf16 instead of fp16"
        )
