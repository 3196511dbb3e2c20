"""`detr-dist predict`: what a model finds in pictures, drawn into them and as COCO results."""

import errno
import json
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from detr_dist.config import Config
from detr_dist.data.coco import CocoData, read_unannotated
from detr_dist.data.images import decode_rgb
from detr_dist.data.layout import decoded_name, find_images
from detr_dist.data.loading import check_room, shared_memory_need
from detr_dist.distributed import (
    HostGroup,
    build_accelerator,
    group_of_processes,
    resolve_precision,
    set_numerics,
)
from detr_dist.errors import DataError, DetrDistError, UsageError
from detr_dist.evaluation.detect import ImagePass
from detr_dist.evaluation.drawing import class_colour, draw_boxes
from detr_dist.evaluation.records import DetectionRecords, coco_results
from detr_dist.inference.trained import (
    TrainedModel,
    fetch_model,
    overrides_without_effect,
    tracking_uri_as_option,
    tracking_uri_for,
)
from detr_dist.storage import check_new, check_writable, describe_disk_error, write_text
from detr_dist.text import list_names, printable

RESULTS = "predictions.json"
_WRITTEN_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
"""Of formats that a copy is written in; the others become PNG."""


@dataclass(frozen=True)
class PredictOptions:
    model: str
    source: Path
    """A picture, or a folder of them."""
    output_dir: Path
    tracking_uri: str
    threshold: float | None = None
    """The least score of a detection, instead of the model's own for each class."""
    overrides: Sequence[str] = ()
    """Of the configuration that the model was trained by."""


def predict(options: PredictOptions) -> None:
    """Draw what the model finds into copies of the pictures, and write it as COCO results.

    Raises:
        DetrDistError: with one clear line.
    """
    tracking_uri = tracking_uri_for(options.tracking_uri, options.overrides)
    folder, names, left_out = find_images(options.source)
    check_new("--output-dir", options.output_dir)
    if options.source.is_dir() and folder.resolve() in options.output_dir.resolve().parents:
        raise UsageError(
            f"--output-dir {options.output_dir}: lies inside --input {options.source}, and its pictures "
            "would be taken for input the next time; give another"
        )
    check_writable("--output-dir", options.output_dir)
    with tracking_uri_as_option(), group_of_processes() as processes:
        if processes.num_processes > 1:
            raise UsageError("predict works in one process; start it without accelerate launch")
        model = fetch_model(options.model, tracking_uri)
        data, unreadable = read_unannotated(folder, names, model.class_names)
        config = resolve_precision(model.settings(options.overrides), HostGroup(processes))
        records, failed, not_drawn = _predict(options, model, data, config)
    if left_out:
        what = "no images by suffix, hidden, or links in a circle"
        print(f"skipped {len(left_out)} that are {what}: {list_names(left_out)}", flush=True)
    for line in sorted((*unreadable, *failed.values())):
        print(f"warning: {printable(line)}; passed over", flush=True)
    if not_drawn:
        print(
            f"warning: {len(not_drawn)} pictures could not be drawn, first {printable(not_drawn[0])}",
            flush=True,
        )
    num_read = len(data) - len(failed)
    if num_read == 0:
        raise DataError(f"{options.source}: none of {len(names)} pictures can be read")
    file_names = [decoded_name(name) for name in data.file_names]
    results = [
        {"file_name": file_names[row], "category_name": data.class_names[label], **result}
        for row, label, result in zip(
            records.image_rows, records.labels, coco_results(data, records), strict=True
        )
    ]
    write_text(options.output_dir / RESULTS, json.dumps(results, indent=1) + "\n")
    passed_over = f", {len(names) - num_read} passed over" if num_read < len(names) else ""
    print(
        f"{len(results)} detections in {num_read} pictures{passed_over}: {options.output_dir}, with COCO "
        f"results in {RESULTS}",
        flush=True,
    )


def _predict(
    options: PredictOptions, model: TrainedModel, data: CocoData, config: Config
) -> tuple[DetectionRecords, dict[int, str], list[str]]:
    """The detections that count, the rows of the pictures that could not be read, with the reason, and a line
    on each that could not be drawn."""
    for line in overrides_without_effect(options.overrides):
        print(line, flush=True)
    check_room(shared_memory_need(config, data, train=False))
    set_numerics(config.training)
    accelerator = build_accelerator(mixed_precision=config.training.mixed_precision)
    detector = model.detector(config).to(accelerator.device)
    thresholds = _thresholds(options, model)
    images = ImagePass(data, config, accelerator)
    copies = _copy_names([os.fsdecode(name) for name in data.file_names])
    parts = [DetectionRecords.none()]
    failed: dict[int, str] = {}
    not_drawn: list[str] = []
    with ThreadPoolExecutor() as threads, closing(images.run(detector)) as all_predicted:
        drawing: list[Future[str]] = []
        for predicted in all_predicted:
            records = images.records(detector, predicted)
            counting = records.take(np.flatnonzero(records.scores >= thresholds[records.labels]))
            parts.append(counting)
            failed |= predicted.unreadable
            not_drawn += _reasons(drawing)  # of the batch before: no more than two wait in memory
            drawing = [
                threads.submit(_draw, options.output_dir / copies[row], data, row, counting)
                for row in predicted.rows
                if row not in predicted.unreadable
            ]
        not_drawn += _reasons(drawing)
    return DetectionRecords.concatenate(parts), failed, not_drawn


def _reasons(drawing: Sequence[Future[str]]) -> list[str]:
    return [reason for done in drawing if (reason := done.result())]


def _copy_names(names: Sequence[str]) -> list[str]:
    """The file of each picture's copy: its own name, with `.png` behind it where it is written as PNG.

    No two are one name to a file system that knows neither case nor composed letters: the later one gets a
    number. Those that keep their names choose first.
    """
    taken = {_folded(parent) for name in names for parent in PurePath(name).parents}
    copies: dict[str, str] = {}
    for name in sorted(names, key=lambda name: PurePath(name).suffix.lower() not in _WRITTEN_SUFFIXES):
        usual = PurePath(name if PurePath(name).suffix.lower() in _WRITTEN_SUFFIXES else f"{name}.png")
        copy, number = usual, 1
        while _folded(copy) in taken:
            number += 1
            copy = usual.with_name(f"{usual.stem}-{number}{usual.suffix}")
        taken.add(_folded(copy))
        copies[name] = str(copy)
        if copy != usual:
            print(printable(f"{name}: drawn as {copy}, as another has its name"), flush=True)
    return [copies[name] for name in names]


def _folded(path: PurePath) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _thresholds(options: PredictOptions, model: TrainedModel) -> NDArray[np.float64]:
    """Of each class."""
    threshold: float | str | None = options.threshold
    if threshold is None and any(
        each.startswith("evaluation.score_threshold=") for each in options.overrides
    ):
        threshold = model.settings(options.overrides).evaluation.score_threshold
    if isinstance(threshold, float):
        return np.full(len(model.class_names), threshold)
    thresholds, lines = model.thresholds_or_default()
    for line in lines:
        print(line, flush=True)
    return np.array(thresholds)


def _draw(path: Path, data: CocoData, row: int, records: DetectionRecords) -> str:
    """A copy of one picture with its boxes, the best on top; or the reason why there is none.

    Raises:
        DetrDistError: nothing can be written there.
    """
    own = records.take(np.flatnonzero(records.image_rows == row)[::-1])
    try:
        captions = [
            f"{data.class_names[label]} {score:.2f}"
            for label, score in zip(own.labels, own.scores, strict=True)
        ]
        image = draw_boxes(
            decode_rgb(data.image_path(row)),
            torch.from_numpy(own.boxes_xyxy_px),
            captions,
            [class_colour(label) for label in own.labels.tolist()],
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    except (
        Exception
    ) as error:  # a format's limits, a library's trouble: the detections are there all the same
        if isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG):
            raise DetrDistError(
                f"{path}: cannot be written ({describe_disk_error(error, path.parent)})"
            ) from error
        return f"{data.image_path(row)}: {' '.join(str(error).split()) or type(error).__name__}"
    return ""
