"""`detr-dist check-data`: what is wrong or unusual in the splits of a data set, as text or JSON.

Also their statistics by class and size.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist.config import Config, ModelConfig, load_config, specific_tiles
from detr_dist.data.automatic_tiles import resolve_tiles
from detr_dist.data.box_sizes import (
    CheckSettings,
    Statistics,
    describe,
    small_classes,
    statistics_of,
    tiny_boxes,
)
from detr_dist.data.clips import clips_in_two_splits
from detr_dist.data.coco import CocoData, classes_of, differing_classes, to_columns
from detr_dist.data.columns import Finding, Level, counted, found
from detr_dist.data.formats import Split, read_annotations, splits_of
from detr_dist.data.image_checks import ImageCheck
from detr_dist.data.images import decoded_name, unlisted_images
from detr_dist.data.records import check_records
from detr_dist.errors import UsageError
from detr_dist.resize import Resize
from detr_dist.text import printable

DUPLICATE_IOU = 0.8
"""Boxes of one class with at least this IoU are duplicates: two objects hardly ever overlap that much."""


CORNERS_FRACTION, CORNERS_LEAST = 1 / 3, 10
"""If more than this fraction of the boxes reach outside, of at least this many boxes, their last two numbers
are probably a corner."""

MOSTLY_EMPTY_FRACTION = 0.5

RESERVATIONS = {
    "class_too_small": "not every class is large enough for the model",
    "clip_in_two_splits": "clips in two splits make the metrics too good",
}
"""Warnings that the verdict repeats: a run would succeed, and its result disappoint."""


@dataclass(frozen=True)
class Report:
    """Findings and statistics of the splits, in their order."""

    settings: CheckSettings
    opened_images: bool
    statistics: dict[str, Statistics]  # by split, if there is anything to count
    findings: dict[str, list[Finding]]  # by split, errors first

    def _num(self, level: Level) -> int:
        return sum(each.level == level for findings in self.findings.values() for each in findings)

    @property
    def num_errors(self) -> int:
        """Number of findings of level `error`, over all splits."""
        return self._num("error")

    @property
    def num_warnings(self) -> int:
        """Number of findings of level `warning`, over all splits."""
        return self._num("warning")

    @property
    def verdict(self) -> str:
        """Return the counts of errors and warnings, and whether the data is ready to train on."""
        counts = f"{counted(self.num_errors, 'error')}, {counted(self.num_warnings, 'warning')}"
        if self.num_errors:
            return f"{counts}: not ready to train"
        kinds = {finding.kind for findings in self.findings.values() for finding in findings}
        reservations = " and ".join(text for kind, text in RESERVATIONS.items() if kind in kinds)
        return f"{counts}: ready to train{reservations and f', but {reservations}'}"

    def lines(self) -> Iterator[str]:
        """Yield the report as text, the verdict last."""
        for split, findings in self.findings.items():
            if split in self.statistics:
                yield from describe(split, self.statistics[split], self.settings)
            else:
                yield f"{printable(split)}: nothing that could be counted"
            yield from (f"  {finding.level}: {finding}" for finding in findings)
            yield ""
        if not self.opened_images:
            yield "images were not opened"
        if self.settings.finest_stride is None:
            yield (
                "not checked: whether classes are too small for the model, because its weights or extension "
                "cannot be read here; the sizes above are without the windows of data.tiles=auto"
            )
        yield f"verdict: {self.verdict}"

    def as_document(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        counts = {split: statistics.as_document() for split, statistics in self.statistics.items()}
        return {
            "ready": self.num_errors == 0,
            "verdict": self.verdict,
            "opened_pictures": self.opened_images,
            "settings": self.settings.as_document(),
            "splits": [{"split": split, **counts.get(split, {})} for split in self.findings],
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
    finest_stride_of: Callable[[ModelConfig], int | None],
    open_images: bool,
    as_json: bool,
) -> bool:
    """Print what is wrong or unusual in the data sets among `targets`; the other targets are settings.

    Returns whether there are no errors.

    Raises:
        UsageError: no folder is given, or a setting is wrong.
        DataError: there is no data set to check.
    """
    folders = [target for target in targets if "=" not in target or Path(target).exists()]
    config = load_config(config_path, [target for target in targets if target not in folders])
    if not folders:
        raise UsageError("no data folder is given; give one or more, the one to train on first")
    splits = list({Path(folder).resolve(): folder for folder in reversed(folders)}.values())[::-1]
    report = check_splits(
        splits,
        config,
        num_queries=num_queries_of(config.model),
        finest_stride=finest_stride_of(config.model),
        open_images=open_images,
    )
    print(json.dumps(report.as_document(), indent=2) if as_json else "\n".join(report.lines()))
    return report.num_errors == 0


def check_splits(
    sources: Sequence[str | Split],
    config: Config,
    *,
    num_queries: int | None,
    finest_stride: int | None,
    open_images: bool,
    num_train: int = 1,
) -> Report:
    """Check all splits of the sources; the first decides on the classes.

    The first `num_train` are together what to train on, so that they may have images and clips in common.
    """
    splits = [split for each in sources for split in (splits_of(each) if isinstance(each, str) else [each])]
    settings = CheckSettings(Resize.of(config.data), num_queries, finest_stride)
    image_check = ImageCheck() if open_images else None
    report = Report(settings, open_images, {}, {})
    reference: tuple[str, tuple[str, ...]] | None = None
    listed: dict[str, list[str]] = {}
    for index, (split, name) in enumerate((split, str(split)) for split in splits):
        annotations = read_annotations(*split, exif=config.data.exif)
        images_dir = annotations.images_dir
        records = check_records(annotations, exif=config.data.exif)
        not_used = "in the folder that the annotations do not list; they are not used"
        unlisted = unlisted_images(images_dir, records.listed_files) if annotations.has_own_folder else []
        findings = found("unlisted_picture", "image", not_used, unlisted, level="warning") + records.findings
        if len(records.image_ids) and classes_of(records.categories):
            data = to_columns(records, annotations, exif=config.data.exif)
            if reference is None:
                reference = name, data.class_names
                settings = _with_tiles(settings, config, data)
            own = classes_of(records.categories, reference[1])
            wanted = [each for each in reference[1] if annotations.lists_classes or each in own]
            findings += differing_classes(wanted, own, reference[0], f"in {name}")
            findings = [_as_corners(each, len(data.box_classes)) for each in findings]
            findings += _check_repeats(data)
            findings += check_boxes(data, settings, trains=index < num_train)
            report.statistics[name] = counts = statistics_of(data, settings)
            if counts.num_images > counts.num_empty > MOSTLY_EMPTY_FRACTION * counts.num_images:
                lost = "without a box, more than half; check that nothing was lost"
                findings += found("mostly_empty", "image", lost, (), count=counts.num_empty, level="warning")
            if image_check is not None:
                is_new = not 0 < index < num_train
                findings += image_check.check(name, data, records.missing_files, is_new_split=is_new)
        report.findings[name] = findings
        listed.setdefault(str(splits[0]) if index < num_train else name, []).extend(records.listed_files)
    clips = clips_in_two_splits(listed)
    _accept_sources_without_boxes(report, [str(split) for split in splits[:num_train]])
    for name, findings in report.findings.items():
        every = findings + clips.get(name, [])
        report.findings[name] = sorted(every, key=lambda finding: finding.level != "error")
    return replace(report, settings=settings)


def _accept_sources_without_boxes(report: Report, train_names: Sequence[str]) -> None:
    """Make a warning of the error that a training source has no box, if another one has boxes."""
    if any(report.statistics[name].num_boxes for name in train_names if name in report.statistics):
        for name in train_names:
            report.findings[name] = [
                replace(each, level="warning") if each.kind == "no_boxes" else each
                for each in report.findings[name]
            ]


def _with_tiles(settings: CheckSettings, config: Config, data: CocoData) -> CheckSettings:
    """Return the settings with the windows of the configuration; without those of `auto` if unknown."""
    if config.data.tiles == "auto" and settings.finest_stride is None:
        return settings
    resolved, _ = resolve_tiles(config, data, settings.finest_stride)
    return replace(settings, tiles=specific_tiles(resolved))


def _as_corners(finding: Finding, num_boxes: int) -> Finding:
    """Replace the warning that boxes reach outside the image by an error if very many do."""
    is_rare = num_boxes < CORNERS_LEAST or finding.count <= CORNERS_FRACTION * num_boxes
    if finding.kind != "box_outside" or is_rare:
        return finding
    what = "reaching outside, so many that they are probably [x1, y1, x2, y2]; give [x, y, width, height]"
    return found("boxes_as_corners", "box", what, finding.examples, count=finding.count)[0]


def _check_repeats(data: CocoData) -> list[Finding]:
    files = _repeated(np.array([normpath(decoded_name(name)) for name in data.file_names]))
    merge = "with the file of an earlier one; merge the entries and their annotations"
    ids = [f"annotation {id_}" for id_ in _repeated(data.annotation_ids)]
    renumber = "with the id of an earlier one; give each its own"
    return [
        *found("file_listed_twice", "image", merge, files),
        *found("duplicate_annotation_id", "annotation", renumber, ids, level="warning"),
    ]


def _repeated(values: NDArray[Any]) -> list[Any]:
    """Return each value that repeats an earlier one, once for each repetition."""
    repeated: list[Any] = np.delete(values, np.unique(values, return_index=True)[1]).tolist()
    return repeated


def check_boxes(data: CocoData, settings: CheckSettings, *, trains: bool = False) -> list[Finding]:
    """Return what is unusual in the boxes used for training; `trains` if this is the training split.

    Fast enough for the start of every run: a fraction of a second for 100,000 images.
    """
    single = np.flatnonzero(~data.iscrowd)
    on_another = "on another of the same image and class; remove all but one"
    findings = found("duplicate_box", "box", on_another, _duplicates(data, single), level="warning")
    xywh_px = data.boxes_xywh_px[single]
    if len(single) and (xywh_px[:, :2] + xywh_px[:, 2:]).max() <= 1:
        in_fractions = "inside the first pixel of their image, as all are; give pixels, not fractions"
        findings += found("boxes_in_fractions", "box", in_fractions, (), count=len(single))
    else:
        findings += tiny_boxes(data, settings)
        findings += small_classes(data, settings)
    refused: Level = "error" if trains else "warning"  # only training refuses it
    if settings.num_queries is not None:
        num_boxes, limit = data.num_boxes, settings.num_queries
        rows = np.flatnonzero(num_boxes > limit)
        too_few = f"with more boxes than the model has queries; raise model.num_queries (it is {limit})"
        examples = (f"{data.image_path(int(row)).name} has {num_boxes[row]}" for row in rows)
        findings += found("too_many_boxes", "image", too_few, examples, count=len(rows), level=refused)
    if len(single):
        used = set(data.box_classes[single].tolist())
        unused = [name for index, name in enumerate(data.class_names) if index not in used]
        without = "without a box; it cannot be learned from or measured on this split"
        findings += found("class_without_boxes", "class", without, unused, level="warning")
    else:
        without = "without a box; check that it is the right file"
        findings += found("no_boxes", "split", without, (), count=1, level=refused)
    return findings


def _duplicates(data: CocoData, single: NDArray[np.intp]) -> list[str]:
    """Describe the boxes that nearly coincide with an earlier one of their image and class.

    Boxes of one image and class are compared from left to right, each with those whose left edge is close
    enough for the required overlap.
    """
    groups = data.image_rows[single] * data.num_classes + data.box_classes[single]
    order = np.lexsort((data.boxes_xywh_px[single, 0], groups))
    rows, groups = single[order], groups[order]
    starts = data.boxes_xywh_px[rows, :2]
    ends = starts + data.boxes_xywh_px[rows, 2:]
    reach = (1 - DUPLICATE_IOU) * (ends - starts)[:, 0]
    covered = np.full(len(data.image_rows), -1)  # the earlier box that each one repeats
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
