"""Box formats, IoU and generalised IoU: broadcasting tensor maths without checks of values or host syncs.

A box is the last dimension of a float tensor: `cxcywh` is (centre x, centre y, width, height), `xyxy` is
(left, top, right, bottom). Both may be normalised to [0, 1] or in pixels; the boxes of one call must use the
same unit.
"""

from typing import NamedTuple

from torch import Tensor, cat, maximum, minimum

from detr_dist.serving.postprocess import cxcywh_to_xyxy as cxcywh_to_xyxy

# Below this area a union or hull counts as a point. In normalised units it is the square of a millionth of
# the image, far under a pixel, so boxes with any real extent are not touched.
_MIN_AREA = 1e-12


class IgnoredRegions(NamedTuple):
    """Parts of images that count neither as objects nor as background, I of all images in image order."""

    labels: Tensor
    """int64 [I], classes of the objects that are visible in part."""
    boxes_cxcywh: Tensor
    """float32 [I, 4], what is visible of them."""
    num_boxes: list[int]
    """Number of regions of each image."""


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes [..., 4] from corners to centre and size."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return cat((0.5 * (top_left + bottom_right), bottom_right - top_left), dim=-1)


def giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return the generalised IoU in [-1, 1] of boxes [..., 4], element by element with broadcasting.

    All pairs of two sets: `giou(a[..., :, None, :], b[..., None, :, :])`. Boxes without extent give finite
    values and finite gradients. Large inputs are fastest when each coordinate is contiguous in memory, that
    is, when [..., 4] is a transposed view of [4, ...].

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019. Departure: areas are clamped
    from below instead of dividing by zero.
    """
    a_left, a_top, a_right, a_bottom = a_xyxy.unbind(-1)
    b_left, b_top, b_right, b_bottom = b_xyxy.unbind(-1)
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    hull_width = maximum(a_right, b_right) - minimum(a_left, b_left)
    hull = (hull_width * (maximum(a_bottom, b_bottom) - minimum(a_top, b_top))).clamp(min=_MIN_AREA)
    return overlap / union - (hull - union) / hull


def iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return the intersection over union in [0, 1] of boxes [..., 4], like `giou` in everything else."""
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    return overlap / union


def _overlap_and_union(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    a_left, a_top, a_right, a_bottom = a_xyxy.unbind(-1)
    b_left, b_top, b_right, b_bottom = b_xyxy.unbind(-1)
    overlap_width = (minimum(a_right, b_right) - maximum(a_left, b_left)).clamp(min=0)
    overlap = overlap_width * (minimum(a_bottom, b_bottom) - maximum(a_top, b_top)).clamp(min=0)
    area_a = (a_right - a_left) * (a_bottom - a_top)
    area_b = (b_right - b_left) * (b_bottom - b_top)
    return overlap, (area_a + area_b - overlap).clamp(min=_MIN_AREA)
