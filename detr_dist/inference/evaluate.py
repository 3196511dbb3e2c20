"""`detr-dist evaluate`: any model on any data of its classes, on one process or several."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from detr_dist import __version__
from detr_dist.data.coco import CocoData, load_coco
from detr_dist.data.loading import check_room, shared_memory_need
from detr_dist.distributed import (
    HostGroup,
    build_accelerator,
    group_of_processes,
    resolve_precision,
    set_numerics,
)
from detr_dist.errors import UsageError
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.evaluate import Details, Evaluator
from detr_dist.evaluation.records import coco_results
from detr_dist.inference.trained import (
    TrainedModel,
    open_model,
    overrides_without_effect,
    tracking_uri_as_option,
    tracking_uri_for,
)
from detr_dist.redaction import redact
from detr_dist.storage import check_new, check_writable, write_text
from detr_dist.text import printable
from detr_dist.training.pictures import draw_folder
from detr_dist.training.sources import find_model


@dataclass(frozen=True)
class EvaluateOptions:
    model: str
    data_dir: Path
    tracking_uri: str
    predictions: Path | None = None
    report: Path | None = None
    pictures: Path | None = None
    model_thresholds: bool = False
    """Count detections at the thresholds that the model brings."""
    overrides: Sequence[str] = ()
    """Of the configuration that the model was trained by."""


def evaluate(options: EvaluateOptions) -> None:
    """Score a model on a data set and say so: a table, and the files that `options` asks for.

    Collective.

    Raises:
        DetrDistError: with one clear line, on every process.
    """
    tracking_uri = tracking_uri_for(options.tracking_uri, options.overrides)
    with tracking_uri_as_option(), group_of_processes() as processes:
        host = HostGroup(processes)
        host.on_main_process(lambda: _check_places(options))
        model = _open(options.model, tracking_uri, host)
        config = resolve_precision(model.settings(options.overrides), host)
        if options.model_thresholds and "evaluation.score_threshold" in [
            each.partition("=")[0] for each in options.overrides
        ]:
            raise UsageError("--model-thresholds and evaluation.score_threshold: give one of the two")
        data = load_coco(
            options.data_dir,
            classes=model.class_names,
            classes_source=options.model,
            may_lack_classes=True,
        )
        host.once_per_machine(partial(check_room, shared_memory_need(config, data, train=False)))
        set_numerics(config.training)
        accelerator = build_accelerator(mixed_precision=config.training.mixed_precision)
        thresholds, remarks = model.thresholds_or_default() if options.model_thresholds else (None, [])
        evaluator = Evaluator(data, config, accelerator, host, thresholds=thresholds)
        if accelerator.is_main_process:
            for line in (*overrides_without_effect(options.overrides), *remarks, *data.notices):
                print(line)
            print(
                f"{len(data)} images; {host.num_processes} processes ({accelerator.device}, precision "
                f"{config.training.mixed_precision}) x batch {config.training.batch_size}",
                flush=True,
            )
        began_at = time.perf_counter()
        scores = evaluator.evaluate(model.detector(config).to(accelerator.device))
        metrics = {f"val_{name}": value for name, value in scores.metrics.items()}
        facts = {
            "model": redact(options.model),
            **{key: model.metadata.get(key) for key in ("run_id", "epoch", "step")},
            "evaluated_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "detr_dist": __version__,
            "data": str(data.annotations_path),
            "num_images": len(data),
            "num_processes": host.num_processes,
            "seconds": time.perf_counter() - began_at,
            "thresholds": "model" if thresholds is not None else config.evaluation.score_threshold,
            "config": config.model_dump(mode="json"),
        }
        host.on_main_process(lambda: _leave(options, data, metrics, scores.details, facts))


def _check_places(options: EvaluateOptions) -> None:
    """What is to be written can be, as far as can be known before hours of work."""
    for name, path in (("--predictions", options.predictions), ("--report", options.report)):
        if path is not None:
            check_writable(name, path.parent)
            if path.is_dir():
                raise UsageError(f"{name} {path}: is a folder; give the path of a file to write")
    if options.pictures is not None:
        check_writable("--pictures", options.pictures.parent)
        check_new("--pictures", options.pictures)


def _open(reference: str, tracking_uri: str, host: HostGroup) -> TrainedModel:
    with tempfile.TemporaryDirectory(prefix="detr_dist_") as scratch:
        found = host.once_per_machine(lambda: find_model(reference, tracking_uri, Path(scratch)))
        model = open_model(reference, found)
        host.gather_rows([0.0])  # the files stay until every process has read them
    return model


def _leave(
    options: EvaluateOptions,
    data: CocoData,
    metrics: dict[str, float],
    details: Details | None,
    facts: dict[str, Any],
) -> None:
    assert details is not None  # on the main process
    print("\n".join(table(data, metrics)))
    source = {"auto": "the best for these data", "model": "those that the model brings"}
    print(f"thresholds: {source.get(str(facts['thresholds']), facts['thresholds'])}", flush=True)
    if options.predictions is not None:
        results = coco_results(data, details.records)
        write_text(options.predictions, json.dumps(results))
        print(f"{options.predictions}: {len(results)} detections as COCO results")
    if options.report is not None:
        report = {
            "metrics": metrics,
            "class_names": data.class_names,
            "confusion": details.operating_points.confusion.tolist(),
            **facts,
        }
        write_text(options.report, json.dumps(report, indent=2) + "\n")
        print(f"{options.report}: the figures, what was taken for what, and how they came about")
    if options.pictures is not None:
        for failure in draw_folder(options.pictures, data, details):
            print(f"warning: {printable(failure)}; not drawn", flush=True)
        if options.pictures.exists():
            print(f"{options.pictures}: curves, confusions and the images with the worst errors")


def table(data: CocoData, metrics: dict[str, float]) -> Iterator[str]:
    """The figures of an evaluation for a terminal: a line for each class and one for all, then the rest."""
    columns = ("map", "precision", "recall", "f1", "threshold")
    num_boxes = np.bincount(data.box_classes[~data.iscrowd], minlength=data.num_classes).tolist()
    width = max(len(name) for name in (*data.class_names, "all classes"))
    yield f"{'class':<{width}} {'boxes':>9}" + "".join(f"{name:>11}" for name in ("AP", *columns[1:]))
    lines = zip(
        (*data.class_names, "all classes"),
        (*num_boxes, sum(num_boxes)),
        (*(f"val_{name}_" for name in metric_names(data.class_names)), "val_"),
        strict=True,
    )
    shown = set()
    for name, boxes, prefix in lines:
        keys = [prefix + column for column in columns]
        shown |= set(keys)
        figures = "".join(f"{metrics[key]:>11.4f}" if key in metrics else f"{'-':>11}" for key in keys)
        yield f"{name:<{width}} {boxes:>9}{figures}"
    yield "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in shown)
