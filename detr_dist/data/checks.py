"""`detr-dist check-data`: what is wrong or unusual in the splits of a data set, as text or JSON.

Also their statistics by class and size.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import Config, ModelConfig, load_config
from detr_dist.data.coco import CocoData, classes_of, differing_classes, find_annotations, to_columns
from detr_dist.data.columns import Finding, found, read_document
from detr_dist.data.image_checks import ImageCheck
from detr_dist.data.images import decoded_name, unlisted_images
from detr_dist.data.records import check_records
from detr_dist.errors import UsageError
from detr_dist.text import printable

SIDE_BANDS_PX = (4, 8, 16, 32, 96)
"""Limits between the bands of sizes. Detectors of this family see one value for each 32x32 or 8x8 pixels;
32 and 96 are COCO's limits of small and large."""

BAND_NAMES = ("<4", "4-8", "8-16", "16-32", "32-96", ">=96")
TINY_SIDE_PX = SIDE_BANDS_PX[0]

DUPLICATE_IOU = 0.8
"""Two objects of one class hardly ever overlap so much; a box that was drawn twice does."""


CORNERS_FRACTION, CORNERS_LEAST = 1 / 3, 10
"""If more than this fraction of the boxes reach outside, of at least so many, their last two numbers are
probably a corner."""

MOSTLY_EMPTY_FRACTION = 0.5


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


@dataclass(frozen=True)
class Report:
    """What was found in the splits, in their order."""

    settings: CheckSettings
    opened_images: bool
    statistics: dict[str, Statistics]  # of the splits that have something to count
    findings: dict[str, list[Finding]]  # of each split, errors first

    @property
    def num_errors(self) -> int:
        return sum(f.level == "error" for findings in self.findings.values() for f in findings)

    @property
    def num_warnings(self) -> int:
        return sum(f.level == "warning" for findings in self.findings.values() for f in findings)

    @property
    def verdict(self) -> str:
        errors = "1 error" if self.num_errors == 1 else f"{self.num_errors} errors"
        warnings = "1 warning" if self.num_warnings == 1 else f"{self.num_warnings} warnings"
        return f"{errors}, {warnings}: {'not ready' if self.num_errors else 'ready'} to train"

    def lines(self) -> Iterator[str]:
        """Yield the report as text, the verdict last."""
        for split, findings in self.findings.items():
            if split in self.statistics:
                yield from _describe(split, self.statistics[split], self.settings)
            else:
                yield f"{printable(split)}: nothing that could be counted"
            yield from (f"  {finding.level}: {finding}" for finding in findings)
            yield ""
        if not self.opened_images:
            yield "images were not opened"
        yield f"verdict: {self.verdict}"

    def as_document(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        splits = [{"split": split, **_count(self.statistics.get(split))} for split in self.findings]
        return {
            "ready": self.num_errors == 0,
            "verdict": self.verdict,
            "opened_pictures": self.opened_images,
            "settings": asdict(self.settings),
            "splits": splits,
            "findings": [
                {"split": split, **asdict(finding)}
                for split, findings in self.findings.items()
                for finding in findings
            ],
        }


def check_data(
    targets: Sequence[str],
    config_path: Path | None,
    *,
    num_queries_of: Callable[[ModelConfig], int | None],
    open_images: bool,
    as_json: bool,
) -> bool:
    """Print what is wrong or unusual in the data folders among `targets`; the other targets are settings.

    Returns whether there are no errors.

    Raises:
        UsageError: no folder is given, or a setting is wrong.
        DataError: a folder holds no COCO JSON to check.
    """
    folders = [target for target in targets if "=" not in target or Path(target).is_dir()]
    config = load_config(config_path, [target for target in targets if target not in folders])
    if not folders:
        raise UsageError("no data folder is given; give one or more, the one to train on first")
    splits = list({Path(folder).resolve(): folder for folder in reversed(folders)}.values())[::-1]
    num_queries = num_queries_of(config.model)
    report = check_splits(splits, config, num_queries=num_queries, open_images=open_images)
    print(json.dumps(report.as_document(), indent=2) if as_json else "\n".join(report.lines()))
    return report.num_errors == 0


def check_splits(
    splits: Sequence[str], config: Config, *, num_queries: int | None, open_images: bool
) -> Report:
    """Check all splits; the first is the one to train on, whose classes the others must have."""
    settings = CheckSettings(config.data.shortest_edge, config.data.longest_edge, num_queries)
    image_check = ImageCheck() if open_images else None
    report = Report(settings, open_images, {}, {})
    reference: tuple[str, tuple[str, ...]] | None = None
    for split in splits:
        path, images_dir = find_annotations(split)
        records = check_records(read_document(path), images_dir)
        findings = found(
            "unlisted_picture",
            "image",
            "in the folder that the JSON does not list; they are not used",
            unlisted_images(images_dir, records.listed_files),
            level="warning",
        )
        findings += records.findings
        if len(records.image_ids) and classes_of(records.categories):
            data = to_columns(records, path, images_dir)
            reference = reference or (split, data.class_names)
            there, names = reference
            own = classes_of(records.categories, names)
            findings += differing_classes(names, own, there, f"in {split}")
            findings = [_as_corners(each, len(data.box_classes)) for each in findings]
            findings += _check_repeats(data)
            findings += check_boxes(data, settings, trains=split == splits[0])
            report.statistics[split] = statistics_of(data, settings)
            findings += _check_empty(report.statistics[split])
            if image_check is not None:
                findings += image_check.check(split, data, records.missing_files)
        report.findings[split] = sorted(findings, key=lambda finding: finding.level != "error")
    return report


def _as_corners(finding: Finding, num_boxes: int) -> Finding:
    """Return an error in place of the warning that boxes reach outside, if very many do."""
    is_rare = num_boxes < CORNERS_LEAST or finding.count <= CORNERS_FRACTION * num_boxes
    if finding.kind != "box_outside" or is_rare:
        return finding
    what = (
        "reaching outside their image, so many that they are probably corners [x1, y1, x2, y2]; boxes are "
        "[x, y, width, height]"
    )
    return found("boxes_as_corners", "box", what, finding.examples, count=finding.count)[0]


def _check_repeats(data: CocoData) -> list[Finding]:
    files = _repeated(normpath(decoded_name(name)) for name in data.file_names)
    merge = "with the file of an earlier one; merge the entries and their annotations"
    ids = [f"annotation {id_}" for id_ in _repeated(data.annotation_ids.tolist())]
    renumber = "with the id of an earlier one; give each its own"
    return [
        *found("file_listed_twice", "image", merge, files),
        *found("duplicate_annotation_id", "annotation", renumber, ids, level="warning"),
    ]


def _repeated(values: Iterable[Any]) -> list[Any]:
    """Return the values that an earlier one equals, once for each time that they are repeated."""
    seen, repeated = set(), []
    for value in values:
        if value in seen:
            repeated.append(value)
        seen.add(value)
    return repeated


def _check_empty(statistics: Statistics) -> list[Finding]:
    if not statistics.num_images > statistics.num_empty > MOSTLY_EMPTY_FRACTION * statistics.num_images:
        return []
    without = "without a box, more than half; check that nothing was lost"
    return found("mostly_empty", "image", without, (), count=statistics.num_empty, level="warning")


def _count(statistics: Statistics | None) -> dict[str, Any]:
    if statistics is None:
        return {}
    of_classes = {
        name: dict(zip(BAND_NAMES, bands, strict=True))
        for name, bands in statistics.num_boxes_by_band.items()
    }
    return {
        "images": statistics.num_images,
        "empty_images": statistics.num_empty,
        "boxes": statistics.num_boxes,
        "most_boxes_in_an_image": statistics.most_boxes,
        "boxes_by_class_and_resized_side_px": of_classes,
    }


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


def _describe(split: str, statistics: Statistics, settings: CheckSettings) -> Iterator[str]:
    queries = "" if settings.num_queries is None else f" for {settings.num_queries} queries"
    empty_fraction = statistics.num_empty / statistics.num_images
    yield (
        f"{printable(split)}: {statistics.num_images} images, {empty_fraction:.1%} of them empty; "
        f"{statistics.num_boxes} boxes, at most {statistics.most_boxes} in an image{queries}"
    )
    edges = f"{settings.shortest_edge}/{settings.longest_edge}"
    yield f"  boxes by pixels a side after the resize to {edges}:"
    table = [["", "all", *BAND_NAMES]]
    table += [
        [printable(name), str(sum(bands)), *map(str, bands)]
        for name, bands in statistics.num_boxes_by_band.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *counts in table:
        cells = [count.rjust(width) for count, width in zip(counts, widths[1:], strict=True)]
        yield f"    {name.ljust(widths[0])}  {'  '.join(cells)}"
