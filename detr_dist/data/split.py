"""`detr-dist split`: whole clips on one side, the wanted fractions of images, rare classes on every side."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.clips import Clips, find_clips
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.coco_writing import write_coco
from detr_dist.data.columns import counted
from detr_dist.data.concatenation import concatenate
from detr_dist.data.formats import splits_of
from detr_dist.data.images import decoded_name
from detr_dist.errors import DataError, UsageError
from detr_dist.storage import check_new, new_folder
from detr_dist.text import printable

SIDES = ("train", "valid", "test")
"""Names of the sides, which are those of their folders."""

LACKING = (1e8, 1e5, 1e2)
"""Cost of a class without boxes on each side, above that of any fractions: a class that is not trained on is
worse than one that is not measured."""
EMPTY = 1e2
"""Cost of a side without images, in classes without boxes."""

MAX_MOVES = 1000
"""Moves after which the improvement of a split ends; a few are usual."""
MAX_TRADED = 500
"""Most clips of which every two are compared; among more, moves of single clips are fine enough."""
LEAST_GAIN = 1e-9
"""Differences below this are rounding."""

Counts = NDArray[np.int64]

_logger = logging.getLogger(__name__)


def split_data(source: Path, output_dir: Path, *, val: float, test: float | None, by: str, seed: int) -> None:
    """Write `train`, `valid` and, with `test`, `test` into a new folder, as COCO, and print their contents.

    Args:
        source: The data set; if it is split already, its splits are joined first.
        output_dir: The folder to make; complete or absent afterwards.
        val: Fraction of the images to validate on.
        test: Fraction of the images to test on; None for no test images.
        by: How to tell clips apart, see `find_clips`.
        seed: The same seed gives the same split, whatever the order of the images.

    Raises:
        UsageError: an argument is wrong, or the output folder is not empty.
        DataError: the data have a fault, or too few clips.
    """
    fractions = _fractions(val, test)
    check_new("OUT", output_dir)
    data = _load_all(source)
    for notice in data.notices:
        _logger.info(notice)
    paths = [data.image_path(row) for row in range(len(data))]
    clips = find_clips(source, [decoded_name(name) for name in data.file_names], by, paths=paths)
    if len(clips.names) < len(fractions):
        raise DataError(
            f"{source}: {clips}, too few for {len(fractions)} sides; add clips, or give --by a regular "
            "expression that tells more apart"
        )
    counts = count_by_clip(data, clips)
    sides = assign_clips(counts, fractions, seed)
    side_of_images = sides[clips.of_images]
    try:
        with new_folder(output_dir, flush=False) as partial:
            for side in range(len(fractions)):
                write_coco(data, np.flatnonzero(side_of_images == side).tolist(), partial / SIDES[side])
    except OSError as error:
        raise DataError(f"{error.filename or output_dir}: {error.strerror}; nothing was written") from None
    print(f"{clips}\n" + "\n".join(_table(data.class_names, counts, sides, len(fractions))))
    for warning in _lacking(data.class_names, counts, sides, len(fractions)):
        _logger.warning(warning)


def _load_all(source: Path) -> CocoData:
    """Read all splits of a data set as one; ids that several of them use are replaced by the row."""
    first, *others = splits_of(source)
    data = load_data(first)
    if not others:
        return data
    further = [
        load_data(
            each,
            classes=data.class_names,
            classes_source=str(first),
            may_lack_classes=True,
        )
        for each in others
    ]
    joined = concatenate([data, *further])
    return replace(
        joined,
        image_ids=_unique(joined.image_ids),
        annotation_ids=_unique(joined.annotation_ids),
    )


def _unique(ids: Counts) -> Counts:
    """Return the ids, or the rows counted from 1 if some are repeated."""
    return ids if len(np.unique(ids)) == len(ids) else np.arange(1, 1 + len(ids))


def count_by_clip(data: CocoData, clips: Clips) -> Counts:
    """Return, for each clip, the number of images and the number of boxes of each class, shape [K, 1 + C].

    Crowds do not count.
    """
    num_columns = 1 + data.num_classes
    of_images = np.array(clips.of_images)
    single = ~data.iscrowd
    cells = of_images[data.image_rows[single]] * num_columns + 1 + data.box_classes[single]
    every = np.concatenate([of_images * num_columns, cells])
    return np.bincount(every, minlength=len(clips.names) * num_columns).reshape(-1, num_columns)


def assign_clips(counts: Counts, fractions: Sequence[float], seed: int) -> Counts:
    """Return the side of each clip, for counts [K, 1 + C] of images and of boxes by class.

    Clips are placed one by one, those of the rarest class first, where images and classes are most lacking.
    Afterwards single clips change sides, and two clips trade places, as long as that improves the split.
    """
    counts = counts[:, counts.any(axis=0)]
    costs = _Costs(counts.sum(axis=0), fractions)
    sides = np.zeros(len(counts), dtype=np.int64)
    sums = np.zeros((len(fractions), counts.shape[1]), dtype=np.int64)
    for clip in _rarest_first(counts, seed):
        rises = [costs.of(side, sums[side] + counts[clip]) - costs.of(side, sums[side]) for side in costs.all]
        sides[clip] = np.argmin(rises)
        sums[sides[clip]] += counts[clip]
    for _ in range(MAX_MOVES):
        if not (_move_one(counts, sides, sums, costs) or _trade_two(counts, sides, sums, costs)):
            break
    return sides


class _Costs:
    """The cost of a side: how far its fractions of images and boxes are from the wanted ones.

    The squared difference is divided by the wanted fraction, so that what is most lacking there counts most.
    Images count as much as all classes together.
    """

    def __init__(self, totals: Counts, fractions: Sequence[float]) -> None:
        self.all = range(len(fractions))
        self._totals, self._fractions = totals, fractions
        num_classes = len(totals) - 1
        self._weights = np.array([1.0, *[1 / num_classes] * num_classes] if num_classes else [1.0])
        self._lacking = np.array([EMPTY, *[1.0] * num_classes])

    def of(self, side: int, sums: Counts) -> NDArray[np.float64]:
        """Return the cost of a side with these counts [..., 1 + C]."""
        wanted = self._fractions[side]
        far: NDArray[np.float64] = (sums / self._totals - wanted) ** 2 / wanted @ self._weights
        lacking: NDArray[np.float64] = LACKING[side] * ((sums == 0) @ self._lacking)
        return far + lacking


def _rarest_first(counts: Counts, seed: int) -> list[int]:
    """Return the clips in the order of their rarest class, large clips first, equal ones at random."""
    ranks = np.empty(counts.shape[1], dtype=np.int64)
    ranks[np.lexsort((counts.sum(axis=0), (counts > 0).sum(axis=0)))] = np.arange(len(ranks))
    rarest = np.where(counts > 0, ranks, len(ranks)).min(axis=1)
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    order: list[int] = shuffled[np.lexsort((-counts[shuffled, 0], rarest[shuffled]))].tolist()
    return order


def _move_one(counts: Counts, sides: Counts, sums: Counts, costs: _Costs) -> bool:
    """Let the clip change sides in place whose move improves the split most; return whether one does."""
    changes = np.empty((len(counts), len(sums)))
    for side in costs.all:
        changes[:, side] = costs.of(side, sums[side] + counts) - costs.of(side, sums[side])
    for side in costs.all:
        own = sides == side
        changes[own] += (costs.of(side, sums[side] - counts[own]) - costs.of(side, sums[side]))[:, None]
        changes[own, side] = 0
    clip, new_side = np.unravel_index(changes.argmin(), changes.shape)
    if changes[clip, new_side] > -LEAST_GAIN:
        return False
    sums[sides[clip]] -= counts[clip]
    sums[new_side] += counts[clip]
    sides[clip] = new_side
    return True


def _trade_two(counts: Counts, sides: Counts, sums: Counts, costs: _Costs) -> bool:
    """Let the first two clips trade places, in place, that improve the split; return whether any do."""
    if len(counts) > MAX_TRADED:
        return False
    for clip, here in enumerate(sides):
        for there in range(here + 1, len(sums)):
            others = np.flatnonzero(sides == there)
            if not len(others):
                continue
            gained = counts[others] - counts[clip]
            changes = costs.of(here, sums[here] + gained) - costs.of(here, sums[here])
            changes += costs.of(there, sums[there] - gained) - costs.of(there, sums[there])
            best = changes.argmin()
            if changes[best] < -LEAST_GAIN:
                sums[here] += gained[best]
                sums[there] -= gained[best]
                sides[clip], sides[others[best]] = there, here
                return True
    return False


def _fractions(val: float, test: float | None) -> list[float]:
    """Return the fractions of training, validation and perhaps test.

    Raises:
        UsageError: there is no such split.
    """
    given = {"--val": val} if test is None else {"--val": val, "--test": test}
    for option, fraction in given.items():
        if not 0 < fraction < 1:
            raise UsageError(f"{option} {fraction}: must be a fraction between 0 and 1, such as 0.2")
    rest = 1 - sum(given.values())
    if rest <= LEAST_GAIN:
        options = " + ".join(given)
        raise UsageError(f"{options} = {sum(given.values()):g}: nothing is left to train on; give less")
    return [rest, *given.values()]


def _table(class_names: Sequence[str], counts: Counts, sides: Counts, num_sides: int) -> Iterator[str]:
    """Yield the numbers of clips, images and boxes of each class, a column for each side."""
    sums = np.stack([counts[sides == side].sum(axis=0) for side in range(num_sides)])
    images = [f"{num} ({num / sums[:, 0].sum():.1%})" for num in sums[:, 0].tolist()]
    rows = [
        ["", *SIDES[:num_sides]],
        ["clips", *map(str, np.bincount(sides, minlength=num_sides).tolist())],
        ["images", *images],
        *(
            [f"boxes of {printable(name)}", *map(str, boxes)]
            for name, boxes in zip(class_names, sums[:, 1:].T.tolist(), strict=True)
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield f"{name.ljust(widths[0])}  {'  '.join(aligned)}"


def _lacking(class_names: Sequence[str], counts: Counts, sides: Counts, num_sides: int) -> Iterator[str]:
    """Yield a warning for each class that a side lacks because too few clips show it."""
    for index, name in enumerate(class_names, 1):
        clips = np.flatnonzero(counts[:, index])
        lacking = [SIDES[side] for side in range(num_sides) if side not in sides[clips]]
        if lacking and len(clips):
            yield (
                f"{printable(name)}: no box in {' and '.join(lacking)}, because only "
                f"{counted(len(clips), 'clip')} of {len(counts)} {'has' if len(clips) == 1 else 'have'} any; "
                "add clips with it"
            )
