"""Agreement of all processes at an optimizer step, by one exchange of a few numbers on the host."""

import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from detr_dist.data.dataset import Batch
from detr_dist.data.sampling import CanvasRule
from detr_dist.distributed import HostGroup
from detr_dist.errors import StopRequested, TrainingError, as_one_line
from detr_dist.models.class_weights import class_weight_of_boxes
from detr_dist.models.criterion import StepCounts
from detr_dist.models.matcher import num_ignored_queries
from detr_dist.training.signals import StopSignals


class Agreed(NamedTuple):
    """The data of an optimizer step, as agreed by all processes."""

    group: list[Batch]
    """The micro-batches of the step on this process."""
    counts: StepCounts
    """Matchable boxes, and images, of the step over all processes: the denominators of the losses."""
    canvas_hw: tuple[int, int]
    """Height and width to which every image of the step is padded, from the sizes of all of them. A
    convolution sees the padding at an image's border, so with a canvas per micro-batch the loss would depend
    on the split of the step over processes."""


_NOT_FINITE = (
    "; look at these images and their boxes, lower training.learning_rate, set training.gradient_clip, "
    "or use bf16 instead of fp16"
)


class _Problem(NamedTuple):
    text: str
    advice: str = ""
    cause: Exception | None = None


def _broken(terms: Sequence[str]) -> _Problem:
    text = f"the term {', '.join(terms)} of the loss was NaN or Inf in this epoch or before"
    return _Problem(text, _NOT_FINITE)


class StepSync:
    """Sums and checks over all processes, once per optimizer step.

    Errors and requests to stop on one process are raised on all of them. Whether the predictions of a step
    were finite is known on the host only after its forward passes; it is sent with the next exchange, so that
    no step waits only for this check. Call `check` before saving anything.
    """

    def __init__(
        self,
        host: HostGroup,
        signals: StopSignals,
        canvas: CanvasRule | None = None,
        *,
        num_queries: int,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self._host = host
        self._signals = signals
        self._canvas = canvas or CanvasRule()
        self._num_queries = num_queries
        self._class_weights = class_weights
        self._problem: _Problem | None = None
        self._image_ids: list[int] = []

    def report(self, *, finite: bool, broken_terms: Sequence[str] = ()) -> None:
        """Record whether a micro-batch of the current step had finite predictions. Not collective.

        If not, `broken_terms` names the terms of the loss that had been NaN or Inf before.
        """
        if not finite:
            text = f"the loss is not finite, image ids {self._image_ids}"
            self._problem = _broken(broken_terms) if broken_terms else _Problem(text, _NOT_FINITE)

    def report_failure(self, error: Exception) -> None:
        """Record an error that keeps this process from the next step. Not collective."""
        self._problem = _Problem(as_one_line(error), cause=error)

    def next_step(self, step: int, groups: Iterator[list[Batch]]) -> Agreed:
        """Fetch and agree on the data of optimizer step `step`, from 0.

        Collective.

        Raises:
            TrainingError: on all processes, if on any of them the previous step was not finite or data cannot
                be loaded.
            StopRequested: on all processes, if any of them was asked to stop; the step is not started.
        """
        group: list[Batch] = []
        self._host.rendezvous.note(step=step)
        try:
            group = next(groups)
        except Exception as error:  # anything else would leave the other processes waiting
            self.report_failure(error)
        image_ids = [image_id for batch in group for image_id in batch.image_ids]
        self._host.rendezvous.note(step=step, image_ids=image_ids)
        sizes_hw = [size for batch in group for size in batch.sizes_hw.tolist()] or [[0, 0]]
        heights, widths = zip(*sizes_hw, strict=True)
        stops, boxes, images, weights, ignored, lows, highs, narrows, wides = self._exchange(
            step,
            float(self._signals.is_requested),
            sum(min(boxes, self._num_queries) for batch in group for boxes in batch.num_boxes),
            sum(len(batch.image_ids) for batch in group),
            sum(map(self._class_weight, group)),
            sum(map(self._num_ignored, group)),
            *(min(heights), max(heights), min(widths), max(widths)),
        )
        if any(stops):
            raise StopRequested(
                f"asked to stop ({self._signals.received or 'another process'}) at step {step}"
            )
        self._image_ids = image_ids
        least_hw, most_hw = (int(min(lows)), int(min(narrows))), (int(max(highs)), int(max(wides)))
        canvas_hw = self._canvas.canvas_hw(least_hw, most_hw)
        class_weight = None if self._class_weights is None else sum(weights)
        counts = StepCounts(sum(boxes), sum(images), class_weight, num_ignored=sum(ignored))
        return Agreed(group, counts, canvas_hw)

    def _num_ignored(self, batch: Batch) -> int:
        """Return the number of queries of a micro-batch that its ignored regions get."""
        if batch.ignored is None:
            return 0
        return num_ignored_queries(batch.num_boxes, batch.ignored.num_boxes, num_queries=self._num_queries)

    def _class_weight(self, batch: Batch) -> float:
        """Return the weights of the classes of a micro-batch's boxes in all; 0 without class weights."""
        if self._class_weights is None:
            return 0.0
        return class_weight_of_boxes(
            batch.labels.numpy(),
            batch.num_boxes,
            num_queries=self._num_queries,
            class_weights=self._class_weights,
        )

    def check(self, step: int, model: nn.Module, broken_terms: Sequence[str] = ()) -> None:
        """Check that the first `step` steps succeeded and left finite weights; raises like `next_step`.

        Collective. Waits for the device.

        Args:
            step: Optimizer steps done.
            model: What was trained.
            broken_terms: Terms of the loss that were NaN or Inf on this process. Under fp16 their steps are
                skipped, so that weights and predictions stay finite.
        """
        if broken_terms:
            self._problem = self._problem or _broken(broken_terms)
        # Under ZeRO-3 a parameter is empty between two steps, and this process's part is a separate tensor.
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            self._problem = self._problem or _Problem("the weights are not finite", _NOT_FINITE)
        self._exchange(step)
        # Not earlier: the host notices a hanging GPU only when it waits for it.
        self._host.rendezvous.watch.pause()

    def _exchange(self, step: int, *values: float) -> list[tuple[float, ...]]:
        """Return the values of all processes by column; raise if any process has a problem."""
        *columns, problems = zip(
            *self._host.gather_rows([*values, float(self._problem is not None)]), strict=True
        )
        if any(problems):
            own = self._problem and self._problem._replace(cause=None)  # which may not be picklable
            found = [
                (process, host, problem)
                for process, (host, problem) in enumerate(
                    self._host.all_gather_objects((socket.gethostname(), own))
                )
                if problem is not None
            ]
            reports = "; ".join(
                f"process {process} ({host}): {problem.text}" for process, host, problem in found
            )
            advice = next((problem.advice for *_, problem in found if problem.advice), "")
            error = TrainingError(f"stopped at step {step}: {reports}{advice}")
            raise error from (self._problem.cause if self._problem is not None else None)
        return columns
