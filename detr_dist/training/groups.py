"""The stream of training data: groups of micro-batches, one group per optimizer step."""

import logging
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from detr_dist.config import Config, DataConfig
from detr_dist.data.coco import CocoData
from detr_dist.data.dataset import Batch, Sample, training_dataset
from detr_dist.data.loading import BatchLoader, shared_memory_need
from detr_dist.data.sampling import CanvasRule, EpochSamples, MicroBatchSampler, StepPlan
from detr_dist.data.transforms import recipe_of

_logger = logging.getLogger(__name__)

# Images that are planned to find the largest canvas: takes less than a second.
_MOST_SIZES = 10_000


def canvas_rule(config: DataConfig) -> CanvasRule:
    """Return the rule by which the images of each training step are padded.

    Fixed sizes are not rounded: they are few, and a family may require multiples of another number.
    """
    if config.resize != "shortest_edge":
        return CanvasRule()
    return CanvasRule(config.canvas_multiple, keep_one_size=recipe_of(config.augmentation) != "detr")


class GroupStream:
    """The groups of this process for a range of optimizer steps, without a pause between epochs.

    Counts waits and images since the counts were last taken.
    """

    def __init__(
        self,
        data: CocoData,
        config: Config,
        plan: StepPlan,
        *,
        process_index: int,
        first_step: int,
        total_steps: int,
        pin_memory: bool,
        samples: EpochSamples | None = None,
    ) -> None:
        self._group_size = config.training.gradient_accumulation_steps
        dataset = training_dataset(data, config, samples)
        self.most_boxes_per_image = dataset.most_boxes_per_image
        self._dataset = dataset
        self._size_hw = dataset.size_hw
        self._canvas_rule = canvas_rule(config.data)
        self._sampler = MicroBatchSampler(
            plan,
            config.training.seed,
            process_index,
            first_step,
            total_steps - first_step,
            dataset.size_hw if config.data.group_by_shape else None,
            config.data.multi_scale,
        )
        self._loader = BatchLoader(
            dataset,
            self._sampler,
            config.data,
            pin_memory=pin_memory,
            need=shared_memory_need(config, data, train=True),
        )
        self._micro_batches: Generator[Batch] | None = None
        self.waited_s = 0.0
        self.num_images = 0
        self.num_unreadable = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        began_at = time.perf_counter()
        if self._micro_batches is None:
            self._micro_batches = iter(self._loader)
        group = [next(self._micro_batches) for _ in range(self._group_size)]
        self.waited_s += time.perf_counter() - began_at
        for batch in group:
            self.num_images += len(batch.image_ids)
            self.num_unreadable += len(batch.unreadable)
            for _, reason in batch.unreadable:
                _logger.warning(f"{reason}; the next image takes its place")
        return group

    def first_samples(self, limit: int) -> list[Sample]:
        """Make up to `limit` samples of the first micro-batch, equal to those that training gets."""
        keys = next(iter(self._sampler), [])
        return [self._dataset[key] for key in keys[:limit]]

    def largest_canvas_hw(self) -> tuple[int, int]:
        """Return height and width of the largest canvas of the remaining steps; in long runs of the next."""
        plan = self._sampler.plan
        steps = replace(
            self._sampler,  # as if one process computed each step at once
            plan=StepPlan(plan.num_samples, plan.global_batch_size, num_processes=1, accumulation=1),
            process_index=0,
            num_steps=min(self._sampler.num_steps, -(-_MOST_SIZES // plan.global_batch_size)),
            edges=sorted(self._sampler.edges)[-1:],  # too rare, perhaps, to be drawn in these steps
        )
        canvases = (self._canvas_hw(list(map(self._size_hw, keys))) for keys in steps)
        return max(canvases, key=math.prod)

    def _canvas_hw(self, sizes_hw: list[tuple[int, int]]) -> tuple[int, int]:
        heights, widths = zip(*sizes_hw, strict=True)
        return self._canvas_rule.canvas_hw((min(heights), min(widths)), (max(heights), max(widths)))

    def close(self) -> None:
        """End the loader processes."""
        if self._micro_batches is not None:
            self._micro_batches.close()
