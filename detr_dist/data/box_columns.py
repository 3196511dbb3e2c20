"""The annotations of a COCO JSON as columns: checked, attached to their images, clipped."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.annotations import Section
from detr_dist.data.classes import ClassMap
from detr_dist.errors import DataError

MIN_BOX_EXTENT_PX = 1e-3
"""A box this narrow or flat has no extent: far under a pixel, still over float32's rounding at 4000 px."""


@dataclass(frozen=True, slots=True, eq=False)
class BoxColumns:
    """One row per annotation, in the order of the JSON."""

    section: Section
    annotation_ids: NDArray[np.int64]
    image_rows: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    xywh_px: NDArray[np.float64]
    iscrowd: NDArray[np.bool_]
    areas: NDArray[np.float64]  # nan where not stated

    def classes(self, class_map: ClassMap) -> NDArray[np.int64]:
        """Raises: DataError for a category that the JSON does not list."""
        listed = [(id_, index) for index, id_ in enumerate(class_map.category_ids) if id_ is not None]
        ids, indices = np.array(listed, dtype=np.int64).reshape(-1, 2).T
        positions, lost = _positions(self.category_ids, ids)
        if len(lost):
            row = int(lost[0])
            raise DataError(
                f"{self.section.where(row)}: has category_id {self.category_ids[row]}, which 'categories' "
                f"does not list ({len(lost)} such annotations); add the category or remove them"
            )
        return indices[positions]

    def clip(
        self, sizes_hw: NDArray[np.int64]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Clip the boxes in place to their images, whose sizes are given per box.

        Returns the rows of the boxes that have an extent afterwards, of those among them that reached
        outside, and of those that have no extent.
        """
        starts, limits = self.xywh_px[:, :2], sizes_hw[:, ::-1]
        outside = np.flatnonzero(((starts < 0) | (starts + self.xywh_px[:, 2:] > limits)).any(axis=1))
        before = self.xywh_px[outside]
        ends = np.minimum(before[:, :2] + before[:, 2:], limits[outside])
        starts = np.maximum(before[:, :2], 0)
        after = np.hstack([starts, np.maximum(ends - starts, 0)])
        self.xywh_px[outside] = after
        has_extent = np.all(self.xywh_px[:, 2:] > MIN_BOX_EXTENT_PX, axis=1)
        moved = np.any(np.abs(after - before) > MIN_BOX_EXTENT_PX, axis=1)
        clipped = outside[moved & has_extent[outside]]
        return np.flatnonzero(has_extent), clipped, np.flatnonzero(~has_extent)


def read_boxes(section: Section, image_ids: NDArray[np.int64]) -> BoxColumns:
    """The annotations of images with these ids.

    Raises:
        DataError: a box is not four numbers, has a negative size, or belongs to no image.
    """
    of_images = section.integers("image_id")
    image_rows, lost = _positions(of_images, image_ids)
    if len(lost):
        row = int(lost[0])
        raise DataError(
            f"{section.where(row)}: belongs to image {of_images[row]}, which 'images' does not list "
            f"({len(lost)} such annotations); remove them or add the images"
        )
    xywh_px = section.boxes("bbox")
    negative = np.flatnonzero((xywh_px[:, 2:] < 0).any(axis=1))
    if len(negative):
        row = int(negative[0])
        raise DataError(
            f"{section.where(row)}: 'bbox' {xywh_px[row].tolist()} has a negative size ({len(negative)} such "
            "boxes); boxes are [x, y, width, height] in pixels"
        )
    return BoxColumns(
        section=section,
        annotation_ids=section.integers("id"),
        image_rows=image_rows,
        category_ids=section.integers("category_id"),
        xywh_px=xywh_px,
        iscrowd=section.integers("iscrowd", default=0).astype(bool),
        areas=section.numbers("area", default=np.nan),
    )


def _positions(
    values: NDArray[np.int64], of: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Where each value stands in `of`, and the rows of the values that do not stand there."""
    order = np.argsort(of)
    positions = order[np.searchsorted(of, values, sorter=order).clip(max=len(of) - 1)]
    return positions, np.flatnonzero(of[positions] != values)
