"""`detr-dist errors`: the hardest images of a data set, with predictions as boxes to correct."""

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detr_dist.config import Config
from detr_dist.data.coco import CocoData, load_data
from detr_dist.data.coco_writing import target_names, write_coco
from detr_dist.data.columns import counted
from detr_dist.data.cvat_writing import write_cvat
from detr_dist.data.formats import split_of
from detr_dist.data.formats.layouts import NoAnnotationsError
from detr_dist.data.image_checks import lacks_rotation
from detr_dist.data.images import find_images
from detr_dist.data.unannotated import read_unannotated
from detr_dist.data.yolo_writing import write_yolo
from detr_dist.environment import check_environment, check_single_process
from detr_dist.errors import DataError
from detr_dist.evaluation.contact_sheet import error_marks
from detr_dist.evaluation.detections import DetectionRecords
from detr_dist.evaluation.drawing import Mark, class_colour, class_label, draw_marks
from detr_dist.evaluation.image_ranking import HardImage, HardObject, rank_by_errors, rank_by_uncertainty
from detr_dist.evaluation.thresholds import operating_points
from detr_dist.inference.model import TrainedModel, open_model
from detr_dist.inference.overrides import import_overrides, tracking_uri_for, warn_of_no_effect
from detr_dist.serving.decoding import decode_rgb
from detr_dist.storage import (
    check_new,
    check_outside,
    check_writable,
    describe_disk_error,
    new_folder,
    write_text,
)
from detr_dist.text import list_names, printable

Form = Literal["coco", "cvat", "yolo"]
DATA, DRAWN, CROPS, TABLE = "data", "drawn", "crops", "errors.csv"
COLUMNS = ("rank", "image", "why", "class", "score", "left", "top", "right", "bottom", "weight")
CROP_PX, CONTEXT, MIN_REGION_PX = 384, 6, 64
"""The longer side of a crop, and the region it shows: this many times the object, and at least so much."""
_WRITERS: dict[Form, Callable[[CocoData, Sequence[int], Path], None]] = {
    "coco": write_coco,
    "cvat": write_cvat,
    "yolo": write_yolo,
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Found:
    """The ranked images of a data set."""

    data: CocoData
    """The images, with the boxes to correct."""
    images: list[HardImage]
    marks_of: Callable[[HardImage], list[Mark]]


def write_hard_images(
    reference: str,
    data_dir: Path,
    output_dir: Path,
    *,
    top: int,
    form: Form,
    tracking_uri: str,
    overrides: Sequence[str] = (),
) -> None:
    """Write the `top` hardest images of a data set, or of a folder of images, into a new folder.

    Raises:
        DetrDistError: with one clear line.
    """
    check_new("--output-dir", output_dir)
    check_outside("--output-dir", output_dir, "--data-dir", data_dir)
    check_writable("--output-dir", output_dir.parent)
    check_environment()
    check_single_process("errors")
    import_overrides(overrides)
    model = open_model(reference, tracking_uri_for(tracking_uri, overrides))
    config = model.prediction_settings(overrides)
    warn_of_no_effect(overrides)
    thresholds = model.least_scores(config, None, overrides)
    data, is_annotated = _load(data_dir, model, config)
    records = _detect(data, model, config)
    rank = _by_errors if is_annotated else _by_uncertainty
    found = rank(data, records, thresholds)
    images = found.images[:top]
    if not images:
        what = "errors" if is_annotated else "uncertain detections"
        raise DataError(f"{data_dir}: no {what} in {counted(len(data), 'image')}; nothing was written")
    try:
        with new_folder(output_dir, flush=False) as partial:
            _WRITERS[form](found.data, [image.row for image in images], partial / DATA)
            _write_table(partial / TABLE, found.data, images)
            for rank_of_image, image in enumerate(images, start=1):
                _draw(found, image, f"{rank_of_image:04d}", partial)
    except OSError as error:
        reason = describe_disk_error(error, output_dir.parent)
        raise DataError(f"{error.filename or output_dir}: {reason}; nothing was written") from None
    if not is_annotated and config.data.exif == "auto":
        warn_of_rotations(data, [image.row for image in images])
    print(
        f"{output_dir}: the {len(images)} hardest of {counted(len(data), 'image')}; correct the boxes in "
        f"{output_dir / DATA}",
        flush=True,
    )


def _load(data_dir: Path, model: TrainedModel, config: Config) -> tuple[CocoData, bool]:
    """Return the data set, and whether it has annotations."""
    try:
        split = split_of(data_dir, "val", "test", "train")
    except NoAnnotationsError:
        folder, names, _ = find_images(data_dir)
        _logger.info(f"{data_dir}: no annotations; images are ranked by the uncertainty of detections")
        data, unreadable = read_unannotated(folder, names, model.class_names, config.data.exif)
        for reason in unreadable:
            _logger.warning(f"{printable(reason)}; skipped")
        return data, False
    data = load_data(
        split,
        classes=model.class_names,
        classes_source=model.reference,
        may_lack_classes=True,
        exif=config.data.exif,
    )
    for notice in data.notices:
        _logger.info(notice)
    return data, True


def warn_of_rotations(data: CocoData, rows: Sequence[int]) -> None:
    """Warn of images that are rotated here, but not when they are trained on: their size does not show it."""
    turned = [row for row in rows if lacks_rotation(data.image_path(row), "auto", data.size_hw(row))]
    if turned:
        names = target_names(data)
        _logger.warning(
            f"{list_names(names[row] for row in turned)}: the boxes are in the image as its EXIF data rotate "
            "it, which the size does not show; train on it with data.exif=apply"
        )


def _detect(data: CocoData, model: TrainedModel, config: Config) -> DetectionRecords:
    """Return all detections, and warn of images that cannot be read; those have none and are not ranked."""
    parts, unreadable = [DetectionRecords.none()], dict[int, str]()
    if len(data):
        with closing(model.find_objects(data, config)) as all_predicted:
            for predicted in all_predicted:
                parts.append(predicted.records)
                unreadable |= predicted.unreadable
    for reason in unreadable.values():
        _logger.warning(f"{printable(reason)}; skipped")
    if len(unreadable) == len(data):
        raise DataError(f"{data.annotations_path}: none of {counted(len(data), 'image')} can be read")
    records = DetectionRecords.concatenate(parts)
    return replace(records, evaluated_rows=np.setdiff1d(records.evaluated_rows, list(unreadable)))


def _by_errors(data: CocoData, records: DetectionRecords, thresholds: NDArray[np.float64]) -> _Found:
    """Rank by errors; to correct are the annotations, with the false positives as further boxes."""
    matches = operating_points(data, records, thresholds.tolist()).matches
    readable = set(records.evaluated_rows.tolist())
    images = [image for image in rank_by_errors(data, matches) if image.row in readable]
    added = np.flatnonzero((matches.boxes < 0) & ~matches.is_duplicate)
    proposed = with_detections(data, matches.detections.take(added))
    return _Found(proposed, images, lambda image: error_marks(data, matches, image.row))


def _by_uncertainty(data: CocoData, records: DetectionRecords, thresholds: NDArray[np.float64]) -> _Found:
    """Rank by uncertainty; to correct are the detections that reach the threshold of their class."""
    names = [class_label(label, name) for label, name in enumerate(data.class_names)]

    def mark_of(found: HardObject) -> Mark:
        score = found.score or 0.0
        caption, is_below = f"{names[found.label]} {score:.2f}", score < thresholds[found.label]
        return Mark(found.box_xyxy_px, class_colour(found.label), caption, dashed=bool(is_below))

    proposed = with_detections(data, records.at_least(thresholds))
    images = rank_by_uncertainty(data, records, thresholds)
    return _Found(proposed, images, lambda image: list(map(mark_of, image.objects)))


def with_detections(data: CocoData, detections: DetectionRecords) -> CocoData:
    """Return the data set with the detections as further boxes, inside their images.

    Classes that the files do not list get category ids, and the boxes annotation ids, after those in use.
    """
    sizes_hw = data.sizes_hw[detections.image_rows]
    limits = np.hstack([sizes_hw[:, ::-1], sizes_hw[:, ::-1]])
    corners = detections.boxes_xyxy_px.astype(np.float64).clip(0, limits)
    boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    has_extent = (boxes[:, 2:] > 0).all(axis=1)
    boxes, num_new = boxes[has_extent], int(has_extent.sum())
    image_rows = np.concatenate([data.image_rows, detections.image_rows[has_extent]])
    order = np.argsort(image_rows, kind="stable")
    new_ids = np.arange(1, 1 + num_new) + data.annotation_ids.max(initial=0)
    next_id = max([0, *(id_ + 1 for id_ in data.category_ids if id_ is not None)])
    free = iter(range(next_id, next_id + data.num_classes))

    def joined(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([old, new.astype(old.dtype)])[order]

    return replace(
        data,
        category_ids=tuple(next(free) if id_ is None else id_ for id_ in data.category_ids),
        box_offsets=np.append(0, np.cumsum(np.bincount(image_rows, minlength=len(data)))),
        boxes_xywh_px=joined(data.boxes_xywh_px, boxes),
        box_classes=joined(data.box_classes, detections.labels[has_extent]),
        iscrowd=joined(data.iscrowd, np.zeros(num_new)),
        areas=joined(data.areas, boxes[:, 2:].prod(axis=1)),
        annotation_ids=joined(data.annotation_ids, new_ids),
        index=None,
    )


def _write_table(path: Path, data: CocoData, images: Sequence[HardImage]) -> None:
    """Write a line for each reason why an image is there."""
    text, names = io.StringIO(), target_names(data)
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for rank, image in enumerate(images, start=1):
        table.writerows([rank, printable(names[image.row]), *_cells(data, each)] for each in image.objects)
    write_text(path, text.getvalue())


def _cells(data: CocoData, found: HardObject) -> Iterator[str]:
    yield from (found.kind, printable(data.class_names[found.label]))
    yield "" if found.score is None else f"{found.score:.4f}"
    yield from (f"{side:.1f}" for side in found.box_xyxy_px)
    yield f"{found.weight:.4f}"


def _draw(found: _Found, image: HardImage, number: str, folder: Path) -> None:
    """Draw one image with its boxes, and enlarge the region around its hardest object."""
    data, marks = found.data, found.marks_of(image)
    pixels = decode_rgb(data.image_path(image.row), data.exif, data.size_hw(image.row))
    drawn = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    name = f"{number}_{PurePath(data.image_path(image.row).name).stem[:60]}.jpg"
    crop = crop_around(drawn, image.objects[0].box_xyxy_px, marks)
    draw_marks(drawn, marks)
    for place, each in ((DRAWN, drawn), (CROPS, crop)):
        (folder / place).mkdir(exist_ok=True)
        each.save(folder / place / name, quality=90)


def crop_around(
    image: Image.Image, box_xyxy_px: tuple[float, float, float, float], marks: Sequence[Mark]
) -> Image.Image:
    """Return the enlarged region of the image around a box, with the marks that lie in it."""
    left, top, right, bottom = box_xyxy_px
    side = max(CONTEXT * (right - left), CONTEXT * (bottom - top), MIN_REGION_PX)
    width, height = (min(round(side), extent) for extent in image.size)
    x = round(min(max((left + right - width) / 2, 0), image.width - width))
    y = round(min(max((top + bottom - height) / 2, 0), image.height - height))
    scale = CROP_PX / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    crop = image.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.BICUBIC)
    inside = []
    for mark in marks:
        x1, y1, x2, y2 = mark.box_xyxy_px
        if x1 < x + width and x < x2 and y1 < y + height and y < y2:
            corners = (x1 - x) * scale, (y1 - y) * scale, (x2 - x) * scale, (y2 - y) * scale
            inside.append(replace(mark, box_xyxy_px=corners))
    draw_marks(crop, inside)
    return crop
