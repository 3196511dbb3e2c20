"""The sizes of boxes after the resize: statistics by class, and what is too small to be found."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.config_tiles import Tiles
from detr_dist.data.coco import CocoData
from detr_dist.data.columns import Finding, found
from detr_dist.resize import Resize
from detr_dist.text import printable

SIDE_BANDS_PX = (4, 8, 16, 32, 96)
"""Limits between the bands of sizes. Detectors of this family see one value for each 32x32 or 8x8 pixels;
32 and 96 are COCO's limits of small and large."""

BAND_NAMES = ("<4", "4-8", "8-16", "16-32", "32-96", ">=96")
TINY_SIDE_PX = SIDE_BANDS_PX[0]

SMALLEST_FRACTION_OF_STRIDE = 1 / 4
"""Fraction of the finest stride below which a side is too small to be seen: such a box covers less than a
sixteenth of a cell, whose one vector has to describe it beside all else in the cell.

That coarse maps lose small objects is measured: on COCO's small ones, of less than 32 pixels a side, DETR at
stride 32 is worse than Faster R-CNN, and gains at stride 16 (Carion et al. 2020, table 1); Deformable DETR,
whose finest is 8, gains most there (Zhu et al. 2021). The limit itself is ours.
"""
TOO_SMALL_FRACTION = 0.5
"""A class is too small for a model if more than this fraction of its boxes are."""

FINE_STRIDE = 8
"""Finest stride of most families; a model with a coarser one can be replaced by one of these."""


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """The settings that the checks depend on."""

    resize: Resize
    num_queries: int | None = None  # of the model; None if it is unknown
    finest_stride: int | None = None  # of the model's feature maps, in pixels; None if it is unknown
    tiles: Tiles | None = None  # which the model sees instead of images, or beside them

    @property
    def resized_to(self) -> str:
        """What becomes of images: the size after the resize, and of which windows."""
        if self.tiles is None:
            return str(self.resize)
        return f"{self.resize} of windows of {'x'.join(map(str, self.tiles.size_hw))}"

    def as_document(self) -> dict[str, Any]:
        """Return the settings as a JSON object, by their configuration keys."""
        edges = asdict(self.resize)
        return {
            "resize": edges.pop("mode"),
            **edges,
            "num_queries": self.num_queries,
            "finest_stride": self.finest_stride,
            "tiles": None if self.tiles is None else self.tiles.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Counts of images, and of the boxes used for training (all but crowds)."""

    num_images: int
    num_empty: int
    most_boxes: int  # in one image
    num_boxes_by_band: dict[str, list[int]]  # of each class

    @property
    def num_boxes(self) -> int:
        """Number of boxes of all classes and sizes."""
        return sum(map(sum, self.num_boxes_by_band.values()))

    def as_document(self) -> dict[str, Any]:
        """Return the statistics as a JSON object."""
        return {
            "images": self.num_images,
            "empty_images": self.num_empty,
            "boxes": self.num_boxes,
            "most_boxes_in_an_image": self.most_boxes,
            "boxes_by_class_and_resized_side_px": {
                name: dict(zip(BAND_NAMES, bands, strict=True))
                for name, bands in self.num_boxes_by_band.items()
            },
        }


def statistics_of(data: CocoData, settings: CheckSettings) -> Statistics:
    """Count images and boxes by class and size after the resize."""
    single = ~data.iscrowd
    bands = np.digitize(resized_sides(data, settings)[single], SIDE_BANDS_PX)
    cells = data.box_classes[single] * len(BAND_NAMES) + bands
    table = np.bincount(cells, minlength=data.num_classes * len(BAND_NAMES)).reshape(-1, len(BAND_NAMES))
    return Statistics(
        num_images=len(data),
        num_empty=int((data.num_boxes == 0).sum()),
        most_boxes=data.max_boxes_per_image,
        num_boxes_by_band=dict(zip(data.class_names, table.tolist(), strict=True)),
    )


def resized_sides(data: CocoData, settings: CheckSettings) -> NDArray[np.float64]:
    """Return the square root of each box's area in pixels after the resize, shape [M].

    With windows, it is that of a window. The resized image is not rounded to whole pixels.
    """
    sizes_hw = data.sizes_hw
    if settings.tiles is not None:
        sizes_hw = sizes_hw.clip(max=settings.tiles.size_hw)
    scales = settings.resize.scales(sizes_hw)
    return scales[data.image_rows] * sides_px(data)


def sides_px(data: CocoData) -> NDArray[np.float64]:
    """Return the square root of each box's area in pixels of the image, shape [M]."""
    sides: NDArray[np.float64] = np.sqrt(data.boxes_xywh_px[:, 2] * data.boxes_xywh_px[:, 3])
    return sides


def tiny_boxes(data: CocoData, settings: CheckSettings) -> list[Finding]:
    """Return a finding on boxes that no model finds, with their number by class."""
    is_tiny = (resized_sides(data, settings) < TINY_SIDE_PX) & ~data.iscrowd
    classes, counts = np.unique(data.box_classes[is_tiny], return_counts=True)
    of_classes = ", ".join(
        f"{count} {printable(data.class_names[index])}" for index, count in zip(classes, counts, strict=True)
    )
    what = (
        "too small to be found after the resize; raise data.shortest_edge (under "
        f"{TINY_SIDE_PX} pixels a side at {settings.resized_to}: {of_classes})"
    )
    return found("tiny_box", "box", what, (), count=int(is_tiny.sum()), level="warning")


def small_classes(data: CocoData, settings: CheckSettings) -> list[Finding]:
    """Return a finding that names the classes most of whose boxes are smaller than the model can see."""
    stride = settings.finest_stride
    if stride is None:
        return []
    limit = stride * SMALLEST_FRACTION_OF_STRIDE
    single = ~data.iscrowd
    is_small = (resized_sides(data, settings) < limit) & single
    totals = np.bincount(data.box_classes[single], minlength=data.num_classes)
    counts = np.bincount(data.box_classes[is_small], minlength=data.num_classes)
    examples = [
        f"{counts[index]} of {totals[index]} {printable(data.class_names[index])}"
        for index in np.flatnonzero(counts > TOO_SMALL_FRACTION * totals)
    ]
    ways = [f"{'set' if settings.tiles is None else 'make smaller'} data.tiles", "raise data.shortest_edge"]
    if stride > FINE_STRIDE:
        ways.append(f"choose a model with a finer one, such as d_fine with {FINE_STRIDE}")
    what = (
        f"too small for the model: its finest feature map has a stride of {stride} pixels, and most boxes "
        f"are under {limit:g} pixels a side after the resize to {settings.resized_to}; "
        f"{', '.join(ways[:-1])} or {ways[-1]}"
    )
    return found("class_too_small", "class", what, examples, level="warning")


def describe(split: str, statistics: Statistics, settings: CheckSettings) -> Iterator[str]:
    """Yield lines on the images of a split, and a table of its boxes by class and size."""
    queries = "" if settings.num_queries is None else f" for {settings.num_queries} queries"
    empty_fraction = statistics.num_empty / statistics.num_images
    yield (
        f"{printable(split)}: {statistics.num_images} images, {empty_fraction:.1%} of them empty; "
        f"{statistics.num_boxes} boxes, at most {statistics.most_boxes} in an image{queries}"
    )
    yield f"  boxes by pixels a side after the resize to {settings.resized_to}:"
    table = [["", "all", *BAND_NAMES]]
    table += [
        [printable(name), str(sum(bands)), *map(str, bands)]
        for name, bands in statistics.num_boxes_by_band.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *counts in table:
        cells = [count.rjust(width) for count, width in zip(counts, widths[1:], strict=True)]
        yield f"    {name.ljust(widths[0])}  {'  '.join(cells)}"
