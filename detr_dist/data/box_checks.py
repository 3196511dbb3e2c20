"""What is unusual in the boxes of a data set, and their statistics by class and size."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.coco import CocoData
from detr_dist.data.columns import Finding, found
from detr_dist.text import printable

SIDE_BANDS_PX = (4, 8, 16, 32, 96)
"""Limits between the bands of sizes. Detectors of this family see one value for each 32x32 or 8x8 pixels;
32 and 96 are COCO's limits of small and large."""

BAND_NAMES = ("<4", "4-8", "8-16", "16-32", "32-96", ">=96")
TINY_SIDE_PX = SIDE_BANDS_PX[0]

DUPLICATE_IOU = 0.8
"""Two objects of one class hardly ever overlap so much; a box that was drawn twice does."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """The part of the configuration that decides what can be found."""

    shortest_edge: int
    longest_edge: int
    num_queries: int | None  # None where it cannot be known


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Counts of the boxes that training sees, so without crowds."""

    num_images: int
    num_empty: int
    most_boxes: int  # in one image
    num_boxes_by_band: dict[str, list[int]]  # of each class

    @property
    def num_boxes(self) -> int:
        return sum(map(sum, self.num_boxes_by_band.values()))


def check_boxes(data: CocoData, settings: CheckSettings, *, trains: bool = False) -> list[Finding]:
    """Return what is unusual in the boxes that training sees; `trains` if the data are to train on.

    Takes a fraction of a second for 100,000 images, so that every run can afford it.
    """
    single = np.flatnonzero(~data.iscrowd)
    on_another = "on another of the same image and class; remove all but one"
    findings = found("duplicate_box", "box", on_another, _duplicates(data, single), level="warning")
    xywh_px = data.boxes_xywh_px[single]
    if len(single) and (xywh_px[:, :2] + xywh_px[:, 2:]).max() <= 1:
        in_fractions = "inside the first pixel of their image, as all are; give pixels, not fractions"
        findings += found("boxes_in_fractions", "box", in_fractions, (), count=len(single))
    else:
        findings += _tiny_boxes(data, settings)
    if settings.num_queries is not None:
        num_boxes = _num_boxes_of_images(data)
        rows = np.flatnonzero(num_boxes > settings.num_queries)
        findings += found(
            "too_many_boxes",
            "image",
            "with more boxes than the model has queries; raise model.num_queries "
            f"(it is {settings.num_queries})",
            (f"{data.image_path(int(row)).name} has {num_boxes[row]}" for row in rows),
            count=len(rows),
            level="error" if trains else "warning",  # training refuses
        )
    per_class = np.bincount(data.box_classes[single], minlength=data.num_classes)
    if len(single):
        unused = [name for name, count in zip(data.class_names, per_class, strict=True) if count == 0]
        without = "without a box; it cannot be learned from or measured on this split"
        findings += found("class_without_boxes", "class", without, unused, level="warning")
    else:  # nothing would be learned
        without = "without a box; check that it is the right file"
        findings += found("no_boxes", "split", without, (), count=1, level="error" if trains else "warning")
    return findings


def statistics_of(data: CocoData, settings: CheckSettings) -> Statistics:
    """Count images and boxes by class and size after the resize."""
    single = ~data.iscrowd
    bands = np.digitize(resized_sides(data, settings)[single], SIDE_BANDS_PX)
    cells = data.box_classes[single] * len(BAND_NAMES) + bands
    table = np.bincount(cells, minlength=data.num_classes * len(BAND_NAMES)).reshape(-1, len(BAND_NAMES))
    num_boxes = _num_boxes_of_images(data)
    return Statistics(
        num_images=len(data),
        num_empty=int((num_boxes == 0).sum()),
        most_boxes=int(num_boxes.max(initial=0)),
        num_boxes_by_band=dict(zip(data.class_names, table.tolist(), strict=True)),
    )


def resized_sides(data: CocoData, settings: CheckSettings) -> NDArray[np.float64]:
    """Return the square root of each box's area in pixels after the resize, shape [M].

    The resized image is not rounded to whole pixels.
    """
    short, long = data.sizes_hw.min(axis=1), data.sizes_hw.max(axis=1)
    scales: NDArray[np.float64] = np.minimum(settings.shortest_edge / short, settings.longest_edge / long)
    return scales[data.image_rows] * np.sqrt(data.boxes_xywh_px[:, 2] * data.boxes_xywh_px[:, 3])


def _num_boxes_of_images(data: CocoData) -> NDArray[np.intp]:
    return np.bincount(data.image_rows[~data.iscrowd], minlength=len(data))


def _tiny_boxes(data: CocoData, settings: CheckSettings) -> list[Finding]:
    is_tiny = (resized_sides(data, settings) < TINY_SIDE_PX) & ~data.iscrowd
    per_class = np.bincount(data.box_classes[is_tiny], minlength=data.num_classes)
    of_classes = ", ".join(
        f"{count} {printable(name)}"
        for name, count in zip(data.class_names, per_class.tolist(), strict=True)
        if count
    )
    what = (
        "too small to be found after the resize; raise data.shortest_edge (under "
        f"{TINY_SIDE_PX} pixels a side at {settings.shortest_edge}/{settings.longest_edge}: {of_classes})"
    )
    return found("tiny_box", "box", what, (), count=int(is_tiny.sum()), level="warning")


def _duplicates(data: CocoData, single: NDArray[np.intp]) -> list[str]:
    """Return the boxes that all but cover, and are covered by, an earlier one of their image and class.

    Boxes of one image and class are compared from left to right, each with those that begin so close to it
    that they could overlap enough.
    """
    groups = data.image_rows[single] * data.num_classes + data.box_classes[single]
    order = np.lexsort((data.boxes_xywh_px[single, 0], groups))
    rows, groups = single[order], groups[order]
    starts = data.boxes_xywh_px[rows, :2]
    ends = starts + data.boxes_xywh_px[rows, 2:]
    reach = (1 - DUPLICATE_IOU) * (ends - starts)[:, 0]
    covered = np.full(len(data.image_rows), -1)  # the earlier box that each lies on
    left, step = np.arange(len(rows)), 0
    while len(left):
        step += 1
        left = left[left + step < len(rows)]
        right = left + step
        is_near = (groups[left] == groups[right]) & (starts[right, 0] - starts[left, 0] <= reach[left])
        left, right = left[is_near], right[is_near]
        shared = np.minimum(ends[left], ends[right]) - np.maximum(starts[left], starts[right])
        intersection = shared.clip(min=0).prod(axis=1)
        both = (ends[left] - starts[left]).prod(axis=1) + (ends[right] - starts[right]).prod(axis=1)
        is_equal = intersection > DUPLICATE_IOU * (both - intersection)
        couples = rows[left[is_equal]], rows[right[is_equal]]
        covered[np.maximum(*couples)] = np.minimum(*couples)
    ids, images = data.annotation_ids, data.image_rows
    return [
        f"annotation {ids[row]} on {ids[covered[row]]} in {data.image_path(int(images[row])).name}"
        for row in np.flatnonzero(covered >= 0)
    ]
