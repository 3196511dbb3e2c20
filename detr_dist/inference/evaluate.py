"""`detr-dist evaluate`: any model on any data of its classes, on one process or several."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detr_dist import __version__
from detr_dist.data.coco import CocoData, load_coco
from detr_dist.distributed import HostGroup, group_of_processes
from detr_dist.errors import UsageError
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.detections import coco_results, start_inference
from detr_dist.evaluation.evaluator import Evaluator, Scores
from detr_dist.inference.model import keys_of, load_model, tracking_uri_for, warn_of_no_effect
from detr_dist.numerics import resolve_precision
from detr_dist.redaction import redact
from detr_dist.storage import check_new, check_writable, write_text
from detr_dist.text import printable

_logger = logging.getLogger(__name__)


def evaluate_model(
    reference: str,
    data_dir: Path,
    *,
    tracking_uri: str,
    predictions: Path | None = None,
    report: Path | None = None,
    pictures: Path | None = None,
    model_thresholds: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Score the model that `reference` names on a data set, and print a table.

    Collective.

    Raises:
        DetrDistError: with one clear line, on every process.
    """
    with group_of_processes() as processes:
        host = HostGroup(processes)
        with host.failing_together():
            if host.is_main_process:
                _check_outputs(predictions, report, pictures)
        model = load_model(reference, tracking_uri_for(tracking_uri, overrides), host)
        config = resolve_precision(model.settings(overrides), host)
        if model_thresholds and "evaluation.score_threshold" in keys_of(overrides):
            raise UsageError("--model-thresholds and evaluation.score_threshold: give one of the two")
        data = load_coco(data_dir, classes=model.class_names, classes_source=reference, may_lack_classes=True)
        accelerator = start_inference(config, data, host)
        thresholds, notices = model.thresholds_or_default() if model_thresholds else (None, [])
        evaluator = Evaluator(data, config, accelerator, host, thresholds=thresholds)
        if accelerator.is_main_process:
            warn_of_no_effect(overrides)
            for line in (*notices, *data.notices):
                _logger.info(line)
            _logger.info(
                f"{len(data)} images; {host.num_processes} processes ({accelerator.device}, precision "
                f"{config.training.mixed_precision}) x batch {config.training.batch_size}"
            )
        started_at = time.perf_counter()
        scores = evaluator.evaluate(model.detector(config).to(accelerator.device))
        facts = {
            "model": redact(reference),
            **{key: model.metadata.get(key) for key in ("run_id", "epoch", "step")},
            "evaluated_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "detr_dist": __version__,
            "data": str(data.annotations_path),
            "num_images": len(data),
            "num_processes": host.num_processes,
            "seconds": time.perf_counter() - started_at,
            "thresholds": "model" if model_thresholds else config.evaluation.score_threshold,
            "config": config.model_dump(mode="json"),
        }
        with host.failing_together():
            if host.is_main_process:
                _write(data, scores, facts, predictions=predictions, report=report, pictures=pictures)


def _check_outputs(predictions: Path | None, report: Path | None, pictures: Path | None) -> None:
    """Check that what is to be written can be, as far as can be known before hours of work."""
    for name, path in (("--predictions", predictions), ("--report", report)):
        if path is not None:
            check_writable(name, path.parent)
            if path.is_dir():
                raise UsageError(f"{name} {path}: is a folder; give the path of a file to write")
    if pictures is not None:
        check_writable("--pictures", pictures.parent)
        check_new("--pictures", pictures)


def _write(
    data: CocoData,
    scores: Scores,
    facts: dict[str, Any],
    *,
    predictions: Path | None,
    report: Path | None,
    pictures: Path | None,
) -> None:
    """Print the table and write the files that were asked for. Main process."""
    metrics, details = {f"val_{name}": value for name, value in scores.metrics.items()}, scores.details
    assert details is not None  # on the main process
    print("\n".join(metrics_table(data, metrics)))
    meaning = {"auto": "the best for these data", "model": "those that the model brings"}
    print(f"thresholds: {meaning.get(facts['thresholds'], facts['thresholds'])}", flush=True)
    if predictions is not None:
        results = coco_results(data, details.records)
        write_text(predictions, json.dumps(results))
        print(f"{predictions}: {len(results)} detections as COCO results")
    if report is not None:
        confusion = details.operating_points.confusion.tolist()
        document = {"metrics": metrics, "class_names": data.class_names, "confusion": confusion, **facts}
        write_text(report, json.dumps(document, indent=2) + "\n")
        print(f"{report}: the metrics, the confusion matrix, and how they were computed")
    if pictures is not None:
        from detr_dist.evaluation.plots import write_plots  # matplotlib: evaluation starts without it

        for failure in write_plots(pictures, data, details):
            _logger.warning(f"{printable(failure)}; not drawn")
        if pictures.exists():
            print(f"{pictures}: curves, confusion matrix and the images with most errors")


def metrics_table(data: CocoData, metrics: dict[str, float]) -> Iterator[str]:
    """Yield the metrics for a terminal: a line for each class and one for all, then the rest."""
    columns = ("map", "precision", "recall", "f1", "threshold")
    num_boxes = np.bincount(data.box_classes[~data.iscrowd], minlength=data.num_classes).tolist()
    names = (*data.class_names, "all classes")
    prefixes = (*(f"val_{name}_" for name in metric_names(data.class_names)), "val_")
    width = max(map(len, names))
    yield f"{'class':<{width}} {'boxes':>9}" + "".join(f"{name:>11}" for name in ("AP", *columns[1:]))
    shown = set()
    for name, boxes, prefix in zip(names, (*num_boxes, sum(num_boxes)), prefixes, strict=True):
        keys = [prefix + column for column in columns]
        shown |= set(keys)
        cells = "".join(f"{metrics[key]:>11.4f}" if key in metrics else f"{'-':>11}" for key in keys)
        yield f"{name:<{width}} {boxes:>9}{cells}"
    yield "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in shown)
