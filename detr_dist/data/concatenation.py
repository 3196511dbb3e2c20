"""Several sources of training data as one data set, and the parts that they have in every epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.formats import split_of
from detr_dist.errors import UsageError
from detr_dist.text import value_of

TrainDir = str | Path | tuple[str | Path, float]
"""A source: `DIR`, `DIR=WEIGHT` as text, or a pair of both."""


class TrainSource(NamedTuple):
    """A data set that is a part of the training data."""

    location: Path
    weight: float | None
    """Its part in every epoch, relative to that of the other sources; None: as many as it has images."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Concatenation(CocoData):
    """The images of several data sets with the same classes, one data set after the other.

    Ids of images and boxes are those of their files, so that different parts may have the same ones.
    """

    parts: tuple[CocoData, ...]  # their columns are parts of these columns
    weights: tuple[float, ...] | None  # of the parts, see `TrainSource`

    def image_path(self, row: int) -> Path:
        """Return the path of the image file of a row."""
        for part in self.parts:
            if row < len(part):
                return part.image_path(row)
            row -= len(part)
        raise IndexError(row)


def parts_of(data: CocoData) -> tuple[CocoData, ...]:
    """Return the data sets that `data` consists of, one if it is not a concatenation."""
    return data.parts if isinstance(data, Concatenation) else (data,)


def weights_of(data: CocoData) -> tuple[float, ...] | None:
    """Return the weights of the data sets that `data` consists of, None if there are none."""
    return data.weights if isinstance(data, Concatenation) else None


def train_sources(train_dir: TrainDir | Sequence[TrainDir]) -> list[TrainSource]:
    """Return the sources that `--train-dir`, or the argument of that name, specifies.

    Raises:
        UsageError: a weight is not a number above 0, only some sources have one, or a source is there twice.
    """
    is_one = isinstance(train_dir, str | Path) or _is_pair(train_dir)
    given: Any = [train_dir] if is_one else train_dir
    sources = [_source(each) for each in given]
    if not sources:
        raise UsageError("--train-dir: no data set is given; give one or several")
    has_weight = [each.weight is not None for each in sources]
    if any(has_weight) and not all(has_weight):
        lacking = sources[has_weight.index(False)].location
        raise UsageError(
            f"--train-dir {lacking}: has no weight, but others have; give all of them one, or none"
        )
    places = [each.location.resolve() for each in sources]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise UsageError(
                f"--train-dir {sources[index].location}: is given twice; give it once, with a weight "
                "(DIR=WEIGHT for each source) if it should count more"
            )
    return sources


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], str | Path | tuple)


def _source(given: Any) -> TrainSource:
    location, weight = given if _is_pair(given) else (given, None)
    if not isinstance(location, str | Path):
        raise UsageError(
            f"train_dir: paths, or pairs of a path and a weight, are wanted, got {value_of(given)}"
        )
    no_such_path = ""
    if isinstance(location, str) and weight is None and "=" in location and not Path(location).exists():
        no_such_path = f" (there is no path {location})"
        location, _, weight = location.rpartition("=")
    if weight is None:
        return TrainSource(Path(location), None)
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 < number < math.inf):
        raise UsageError(
            f"--train-dir {location}: the weight must be a number above 0, and is {value_of(weight)}"
            f"{no_such_path}"
        )
    return TrainSource(Path(location), number)


def load_sources(sources: Sequence[TrainSource], exif: ExifRule = "auto") -> CocoData:
    """Read and check training data from one or several sources; the first one decides on the classes.

    Of a source that is split, the split `train` is read.

    Raises:
        DataError: names the file, and what is wrong with it.
    """
    splits = [split_of(each.location, "train") for each in sources]
    first = load_data(splits[0], exif=exif)
    if len(sources) == 1:
        return first
    others = [
        load_data(each, classes=first.class_names, classes_source=str(splits[0]), exif=exif)
        for each in splits[1:]
    ]
    weights = tuple(each.weight for each in sources if each.weight is not None)
    return concatenate([first, *others], weights or None)


_OF_IMAGES = ("image_ids", "sizes_hw")
_OF_BOXES = ("boxes_xywh_px", "box_classes", "iscrowd", "areas", "annotation_ids")


def concatenate(parts: Sequence[CocoData], weights: tuple[float, ...] | None = None) -> Concatenation:
    """Return the images of several data sets with the same classes as one data set.

    The columns are copied; most of those of the returned parts are views of the copy.
    """
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in _OF_IMAGES + _OF_BOXES
    }
    images, boxes = 0, 0
    views, offsets = [], []
    for part in parts:
        own = {name: columns[name][images : images + len(part)] for name in _OF_IMAGES}
        own |= {name: columns[name][boxes : boxes + len(part.box_classes)] for name in _OF_BOXES}
        views.append(replace(part, **own))
        offsets.append(part.box_offsets[:-1] + boxes)
        images, boxes = images + len(part), boxes + len(part.box_classes)
    return Concatenation(
        annotations_path=parts[0].annotations_path,
        images_dir=parts[0].images_dir,
        class_names=parts[0].class_names,
        category_ids=parts[0].category_ids,
        notices=[notice for part in parts for notice in part.notices],
        file_names=np.concatenate([part.file_names for part in parts]),
        box_offsets=np.concatenate([*offsets, [boxes]]),
        exif=parts[0].exif,
        **columns,
        parts=tuple(views),
        weights=weights,
    )
