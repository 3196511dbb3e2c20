"""`detr-dist predict`: detections drawn into copies of images, and as COCO results."""

import errno
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData
from detr_dist.data.images import decoded_name, find_images, folded
from detr_dist.data.unannotated import read_unannotated
from detr_dist.environment import check_environment, check_single_process
from detr_dist.errors import DataError, DetrDistError, as_one_line
from detr_dist.evaluation.detections import DetectionRecords, Detections, coco_results
from detr_dist.evaluation.image_pass import Predicted
from detr_dist.inference.model import open_model
from detr_dist.inference.overrides import import_overrides, tracking_uri_for, warn_of_no_effect
from detr_dist.serving.decoding import decode_rgb
from detr_dist.storage import check_new, check_outside, check_writable, describe_disk_error, write_text
from detr_dist.text import list_names, printable

RESULTS = "predictions.json"
_WRITTEN_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Suffixes of formats that copies keep; copies of other images are PNG."""

_logger = logging.getLogger(__name__)


def predict_images(
    reference: str,
    source: Path,
    output_dir: Path,
    *,
    tracking_uri: str,
    threshold: float | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Draw the detections of the model `reference` into copies of an image or of a folder of images.

    Raises:
        DetrDistError: with one clear line.
    """
    folder, names, skipped = find_images(source)
    _check_output(output_dir, source)
    check_environment()
    check_single_process("predict")
    import_overrides(overrides)
    model = open_model(reference, tracking_uri_for(tracking_uri, overrides))
    config = model.prediction_settings(overrides)
    warn_of_no_effect(overrides)
    least = model.least_scores(config, threshold, overrides)
    if skipped:
        what = "no images by suffix, hidden, or links in a circle"
        _logger.info(f"skipped {len(skipped)} that are {what}: {list_names(skipped)}")
    data, unreadable = read_unannotated(folder, names, model.class_names, config.data.exif)
    with closing(model.find_objects(data, config)) as all_predicted:
        records, undecodable = _draw_all(all_predicted, data, least, output_dir)
    unreadable += undecodable
    for reason in sorted(unreadable):
        _logger.warning(f"{printable(reason)}; skipped")
    num_read = len(names) - len(unreadable)
    if num_read == 0:
        raise DataError(f"{source}: none of {len(names)} images can be read")
    num_detections = _write_results(output_dir / RESULTS, data, records)
    rest = f", {len(unreadable)} skipped" if unreadable else ""
    where = f"{output_dir}, with COCO results in {RESULTS}"
    print(f"{num_detections} detections in {num_read} images{rest}: {where}", flush=True)


def _check_output(output_dir: Path, source: Path) -> None:
    check_new("--output-dir", output_dir)
    check_outside("--output-dir", output_dir, "--input", source)
    exists = output_dir.exists()
    check_writable("--output-dir", output_dir)
    if not exists:
        output_dir.rmdir()  # created again with the first file: a failure before leaves no empty folder


def _draw_all(
    all_predicted: Iterable[Predicted], data: CocoData, least_scores: NDArray[np.float64], output_dir: Path
) -> tuple[DetectionRecords, list[str]]:
    """Draw each batch of images while the next one is computed.

    Returns:
        The detections that reach their class's minimum score, and the reasons why images cannot be decoded.
    """
    copies = _copy_names([os.fsdecode(name) for name in data.file_names])
    parts, undecodable, not_drawn = [DetectionRecords.none()], list[str](), list[str]()
    with ThreadPoolExecutor() as threads:
        drawing: list[Future[str | None]] = []
        for rows, _, _, records, unreadable in all_predicted:
            found = records.at_least(least_scores)
            parts.append(found)
            undecodable += unreadable.values()
            not_drawn += _reasons(drawing)  # waits for the batch before: at most two are in memory
            drawing = [
                threads.submit(
                    _draw,
                    data.image_path(row),
                    data.exif,
                    output_dir / copies[row],
                    found.of_image(row, data.class_names),
                )
                for row in rows
                if row not in unreadable
            ]
        not_drawn += _reasons(drawing)
    if not_drawn:
        _logger.warning(f"{len(not_drawn)} images could not be drawn, first {printable(not_drawn[0])}")
    return DetectionRecords.concatenate(parts), undecodable


def _reasons(drawing: Sequence[Future[str | None]]) -> list[str]:
    return [reason for done in drawing if (reason := done.result()) is not None]


def _copy_names(names: Sequence[str]) -> list[str]:
    """Return the file name of each image's copy: its own name, with `.png` appended if it becomes PNG.

    If a file system that ignores case and Unicode composition would not distinguish two names, the later one
    gets a number. Images that keep their names choose first.
    """
    taken = {folded(str(parent)) for name in names for parent in PurePath(name).parents}
    copies: dict[str, str] = {}
    for name in sorted(names, key=lambda name: PurePath(name).suffix.lower() not in _WRITTEN_SUFFIXES):
        usual = PurePath(name if PurePath(name).suffix.lower() in _WRITTEN_SUFFIXES else f"{name}.png")
        copy, number = usual, 1
        while folded(str(copy)) in taken:
            number += 1
            copy = usual.with_name(f"{usual.stem}-{number}{usual.suffix}")
        taken.add(folded(str(copy)))
        copies[name] = str(copy)
        if copy != usual:
            _logger.info(printable(f"{name}: drawn as {copy}, because another copy has that name"))
    return [copies[name] for name in names]


def _draw(source: Path, exif: ExifRule, path: Path, found: Detections) -> str | None:
    """Draw a copy of one image, read as for the detection, with its boxes; return the reason if that fails.

    Raises:
        DetrDistError: nothing can be written there.
    """
    try:
        image = found.draw(Image.fromarray(decode_rgb(source, exif).permute(1, 2, 0).numpy()))
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except Exception as error:  # a format's limits or a library's failure, which the detections survive
        if isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG):
            raise DetrDistError(
                f"{path}: cannot be written ({describe_disk_error(error, path.parent)})"
            ) from error
        return f"{source}: {as_one_line(error)}"
    return None


def _write_results(path: Path, data: CocoData, records: DetectionRecords) -> int:
    """Write all detections as COCO results, with the names of files and classes; return their count."""
    file_names = [decoded_name(name) for name in data.file_names]
    results = [
        {"file_name": file_names[row], "category_name": data.class_names[label], **result}
        for row, label, result in zip(
            records.image_rows, records.labels, coco_results(data, records), strict=True
        )
    ]
    path.parent.mkdir(parents=True, exist_ok=True)  # no copy may have been drawn
    write_text(path, json.dumps(results, indent=1) + "\n")
    return len(results)
