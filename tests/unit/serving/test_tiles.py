"""The grid of windows, and the merging of their detections."""

import numpy as np
import pytest

from detr_dist.serving import tiles
from detr_dist.serving.grid import Grid
from detr_dist.serving.tiles import merge_windows, rounds

SIZES_HW = [(100, 100), (64, 64), (65, 64), (64, 1), (30, 200), (65, 65), (216, 384), (1, 1)]


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize(
    "grid", [Grid((64, 64), 0.2, True), Grid((64, 64), 0.0, False), Grid((64, 64), 0.9, False)]
)
def test_windows_of_one_size_cover_the_image_and_overlap(grid, size_hw):
    height, width = size_hw
    windows = np.array(grid.windows(height, width))
    assert len(windows) == grid.num_windows(height, width)
    own = windows[:-1] if grid.full_image and len(windows) > 1 else windows
    covered = np.zeros(size_hw, dtype=bool)
    for left, top, right, bottom in own:
        assert (right - left, bottom - top) == (min(64, width), min(64, height))
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert len(np.unique(windows, axis=0)) == len(windows)
    for first in (0, 1):
        starts = np.unique(own[:, first])
        assert (64 - np.diff(starts) >= grid.overlap * 64).all()


def test_an_image_of_4k_is_covered_by_33_windows():
    windows = Grid((640, 640), 0.2, True).windows(2160, 3840)
    covered = np.zeros((2160, 3840), dtype=bool)
    for left, top, right, bottom in windows[:-1]:
        assert (right - left, bottom - top) == (640, 640)
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert (len(windows), windows[-1]) == (33, (0, 0, 3840, 2160))


def test_an_image_that_fits_into_a_window_has_only_this_one():
    assert Grid((64, 64), 0.2, True).windows(64, 50) == [(0, 0, 50, 64)]


def test_a_remainder_of_one_pixel_is_in_a_second_window():
    assert Grid((64, 64), 0.0, False).windows(64, 65) == [(0, 0, 64, 64), (1, 0, 65, 64)]


@pytest.mark.parametrize(
    ("side", "window", "overlap", "starts"),
    [
        (64, 64, 0.2, [0]),
        (65, 64, 0.2, [0, 1]),
        (115, 64, 0.2, [0, 51]),
        (116, 64, 0.2, [0, 26, 52]),
        (192, 64, 0.0, [0, 64, 128]),
        (32, 32, 0.9, [0]),
    ],
)
def test_windows_are_as_few_as_overlap_enough(side, window, overlap, starts):
    windows = Grid((window, window), overlap, False).windows(window, side)
    assert [left for left, *_ in windows] == starts


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.33, 0.9])
def test_neighbours_have_at_least_the_overlap(overlap):
    for side in range(50, 400):
        starts = [left for left, *_ in Grid((50, 50), overlap, False).windows(50, side)]
        assert (starts[0], starts[-1]) == (0, side - 50)
        assert max(np.diff(starts), default=0) <= 50 * (1 - overlap) + 1e-9


def test_windows_of_some_images_form_batches_together():
    assert rounds([20, 20, 20, 1, 50], 2) == [range(2), range(2, 5)]
    assert rounds([100, 100], 2) == [range(1), range(1, 2)]
    assert rounds([], 2) == []


def detections(seed, size_hw, grid, number):
    """Random objects of an image, each found in every window that shows a part of it, with noise."""
    rng, (height, width) = np.random.default_rng(seed), size_hw
    windows = np.array(grid.windows(*size_hw))
    corners = rng.uniform(0, [width, height], (number, 2))
    objects = np.hstack((corners, corners + rng.uniform(4, 60, (number, 2)))).clip(0, [width, height] * 2)
    labels_of_objects = rng.integers(2, size=number)
    boxes, labels, rows = [], [], []
    for row, window in enumerate(windows):
        clipped = objects.clip([*window[:2]] * 2, [*window[2:]] * 2) + rng.uniform(-0.3, 0.3, objects.shape)
        visible = ((clipped[:, 2:] - clipped[:, :2]) > 2).all(axis=1)
        boxes.append(clipped[visible])
        labels.append(labels_of_objects[visible])
        rows.append(np.full(visible.sum(), row))
    boxes, labels, rows = (np.concatenate(each) for each in (boxes, labels, rows))
    scores = rng.integers(1, 20, len(boxes)) / 20  # with equal ones
    return boxes.astype(np.float32), scores.astype(np.float32), labels, rows, windows


def slow_merge(boxes, scores, labels, rows, windows, most):
    """Apply the definition of `merge_windows` to one pair of detections after the other."""
    image = [windows[:, 0].min(), windows[:, 1].min(), windows[:, 2].max(), windows[:, 3].max()]

    def is_cut(index):
        window = windows[rows[index]]
        sides = [window[2] - window[0], window[3] - window[1]] * 2
        return any(
            window[edge] != image[edge]
            and abs(boxes[index][edge] - window[edge]) <= tiles.NEAR_BORDER * sides[edge]
            for edge in range(4)
        )

    def area(box):
        return (box[2] - box[0]) * (box[3] - box[1])

    def are_the_same(one, other):
        if labels[one] != labels[other] or rows[one] == rows[other]:
            return False
        a, b = boxes[one], boxes[other]
        shared = [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]
        if shared[2] <= shared[0] or shared[3] <= shared[1]:
            return False
        over_smaller = area(shared) / min(area(a), area(b))
        over_union = area(shared) / (area(a) + area(b) - area(shared))
        cut = is_cut(one) or is_cut(other)
        return over_union >= tiles.SAME_IOU or (cut and over_smaller >= tiles.SAME_OVER_SMALLER)

    order = sorted(range(len(boxes)), key=lambda i: -scores[i] * (tiles.WORTH_OF_CUT if is_cut(i) else 1))
    chosen = []
    for index in order[: tiles.MERGED_FROM]:
        if len(chosen) < most and not any(are_the_same(better, index) for better in chosen):
            chosen.append(index)
    return sorted(chosen, key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [300, 7])
def test_merging_equals_its_definition(seed, most):
    found = detections(seed, (150 + seed, 200), Grid((64 + seed, 64 + seed), 0.2, seed % 2 == 0), 25)
    assert merge_windows(*found, most=most).tolist() == slow_merge(*found, most)


def test_an_object_across_four_windows_is_found_once():
    windows = np.array(Grid((64, 64), 0.0, False).windows(128, 128))
    whole = np.array([44, 44, 84, 84])
    parts = [whole.clip([*w[:2]] * 2, [*w[2:]] * 2) for w in windows]
    full = np.vstack((windows, [[0, 0, 128, 128]]))
    boxes = np.array([*parts, whole], dtype=np.float32)
    scores = np.array([0.9, 0.9, 0.9, 0.9, 0.6], dtype=np.float32)
    labels, rows = np.zeros(5, dtype=np.int64), np.arange(5)
    assert merge_windows(boxes, scores, labels, rows, full, most=300).tolist() == [4]
    scores[4] = 0.1  # hardly found in the full image: the parts are better than nothing
    assert merge_windows(boxes, scores, labels, rows, full, most=300).tolist() == [0, 1, 2, 3]


def test_neighbours_in_one_window_remain_and_classes_do_not_mix():
    windows = np.array(Grid((64, 64), 0.5, False).windows(64, 96))
    boxes = np.array(
        [[40, 10, 50, 30], [41, 10, 51, 30], [40, 10, 50, 30], [40, 10, 50, 30]], dtype=np.float32
    )
    scores = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
    labels, rows = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    assert merge_windows(boxes, scores, labels, rows, windows, most=300).tolist() == [0, 1, 3]


def test_nothing_found_is_nothing_merged():
    windows = np.array(Grid((64, 64), 0.5, True).windows(64, 96))
    none = np.zeros(0, dtype=np.int64)
    found = merge_windows(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), none, none, windows, most=300
    )
    assert found.tolist() == []
