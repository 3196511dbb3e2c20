"""Evaluation of any model on any data of its classes, on one process or several, and its output files."""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detr_dist import __version__
from detr_dist.config import Config
from detr_dist.data.coco import load_data
from detr_dist.data.columns import counted
from detr_dist.data.formats import split_of
from detr_dist.data.loading import check_room, shared_memory_need
from detr_dist.distributed import HostGroup, build_accelerator, group_of_processes
from detr_dist.errors import UsageError
from detr_dist.evaluation.coco_metrics import metric_names
from detr_dist.evaluation.detections import coco_results
from detr_dist.evaluation.error_analysis import KINDS
from detr_dist.evaluation.evaluator import Details, Evaluator
from detr_dist.evaluation.metrics_table import class_tables, metrics_table
from detr_dist.extensions import LOSSES
from detr_dist.inference.model import TrainedModel, open_model
from detr_dist.inference.overrides import (
    EXTENSIONS_KEY,
    import_overrides,
    keys_of,
    tracking_uri_for,
    warn_of_no_effect,
)
from detr_dist.numerics import resolve_precision
from detr_dist.redaction import redact
from detr_dist.serving.precision import temporary_numerics
from detr_dist.storage import check_new, check_writable, write_text
from detr_dist.text import list_names, printable

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """The result of an evaluation, the same on every process except for `details`."""

    metrics: dict[str, float]
    """Metrics by their names in a run: `val_map`, `val_<class>_map` and so on; docs/evaluation.md."""
    per_class: dict[str, dict[str, float]]
    """Metrics by class name and then by their names without `val_<class>_`, if they are defined."""
    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]
    """[C + 1, C + 1], rows truth, columns predicted; the last row and column are the background."""
    facts: dict[str, Any] = field(repr=False)
    """The model, the data, the settings and the duration of the evaluation."""
    details: Details | None = field(repr=False)
    """The detections and annotations of every image; on the main process only, None elsewhere."""


def evaluate(
    model: TrainedModel | str | Path,
    data_dir: str | Path,
    *,
    model_thresholds: bool = False,
    overrides: Sequence[str] = (),
    tracking_uri: str | None = None,
) -> EvaluationReport:
    """Score a model on a data set.

    Collective: under `accelerate launch` or `notebook_launcher` every process evaluates its part of the
    images.

    Args:
        model: A loaded model, or a reference for `load_model`.
        data_dir: A data set with the classes of the model, or some of them. Of one that is split, this
            takes `val`, else `test`.
        model_thresholds: Compute precision, recall and F1 at the thresholds found in training and saved with
            the model, instead of the best ones for these data.
        overrides: `section.key=value`; the other settings are those that the model was trained with.
        tracking_uri: URI of MLflow's store, as for `load_model`.

    Raises:
        DetrDistError: with one clear line, on every process.
    """
    with group_of_processes() as processes:
        return _evaluate(
            model, Path(data_dir), HostGroup(processes), model_thresholds, overrides, tracking_uri
        )


def _evaluate(
    model: TrainedModel | str | Path,
    data_dir: Path,
    host: HostGroup,
    model_thresholds: bool,
    overrides: Sequence[str],
    tracking_uri: str | None,
) -> EvaluationReport:
    import_overrides(overrides)
    if not isinstance(model, TrainedModel):
        model = open_model(str(model), tracking_uri_for(tracking_uri, overrides), host)
    config, skipped = _without_unknown_losses(resolve_precision(model.settings(overrides), host))
    if model_thresholds and "evaluation.score_threshold" in keys_of(overrides):
        raise UsageError("--model-thresholds and evaluation.score_threshold: give one of the two")
    data = load_data(
        split_of(data_dir, "val", "test"),
        classes=model.class_names,
        classes_source=model.reference,
        may_lack_classes=True,
        exif=config.data.exif,
    )
    host.once_per_node(lambda: check_room(shared_memory_need(config, data, train=False)))
    with temporary_numerics(config.training):
        accelerator = build_accelerator(mixed_precision=config.training.mixed_precision)
        thresholds, notices = model.thresholds_or_default() if model_thresholds else (None, [])
        evaluator = Evaluator(data, config, accelerator, host, thresholds=thresholds)
        if host.is_main_process:
            warn_of_no_effect(overrides)
            for line in (*skipped, *notices, *data.notices):
                _logger.info(line)
            _logger.info(
                f"{counted(len(data), 'image')}; {counted(host.num_processes, 'process')} "
                f"({accelerator.device}, precision {config.training.mixed_precision}) x batch "
                f"{config.training.batch_size}"
            )
        started_at = time.perf_counter()
        scores = evaluator.evaluate(model.detector(config, accelerator.device))
    metrics = {f"val_{name}": value for name, value in scores.metrics.items()}
    details = scores.details
    confusion = None if details is None else details.operating_points.confusion
    return EvaluationReport(
        metrics=metrics,
        per_class=_by_class(metrics, data.class_names, config.evaluation.size_bands),
        class_names=data.class_names,
        confusion=host.broadcast(confusion),
        facts={
            "model": redact(model.reference),
            **{key: model.metadata.get(key) for key in ("run_id", "epoch", "step")},
            "evaluated_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "detr_dist": __version__,
            "data": str(data.annotations_path),
            "num_images": len(data),
            "num_processes": host.num_processes,
            "seconds": time.perf_counter() - started_at,
            "thresholds": "model" if model_thresholds else config.evaluation.score_threshold,
            "config": config.model_dump(mode="json"),
        },
        details=details,
    )


def _without_unknown_losses(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration without parts of the loss that nobody has registered here, and a line on them.

    No other metric needs them, and what a model's own settings name is never imported.
    """
    weights = {name: weight for name, weight in config.loss.weights.items() if LOSSES.knows(name)}
    unknown = [name for name in config.loss.weights if name not in weights]
    loss = config.loss.model_copy(update={"weights": weights})
    line = (
        f"val_loss is without {list_names(unknown)}: import what registers it, or give {EXTENSIONS_KEY}=[...]"
    )
    return config.model_copy(update={"loss": loss}), [line] if unknown else []


def _by_class(
    metrics: dict[str, float], class_names: Sequence[str], size_bands: Sequence[int]
) -> dict[str, dict[str, float]]:
    tables = class_tables(size_bands).values()
    keys = zip(class_names, metric_names(class_names), strict=True)
    return {
        name: {
            metric: metrics[f"val_{key}_{metric}"]
            for table in tables
            for metric in table
            if f"val_{key}_{metric}" in metrics
        }
        for name, key in keys
    }


def evaluate_to_files(
    reference: str,
    data_dir: Path,
    *,
    tracking_uri: str,
    predictions: Path | None = None,
    report: Path | None = None,
    pictures: Path | None = None,
    model_thresholds: bool = False,
    log: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Evaluate, print a table, and write the requested files; with `log`, log the results to MLflow.

    Collective.

    Raises:
        DetrDistError: with one clear line, on every process.
    """
    tracking_uri = tracking_uri_for(tracking_uri, overrides)
    with group_of_processes() as processes:
        host = HostGroup(processes)
        with host.failing_together():
            if host.is_main_process:
                _check_outputs(predictions, report, pictures)
        model = open_model(reference, tracking_uri, host)
        found = _evaluate(model, data_dir, host, model_thresholds, overrides, tracking_uri)
        with host.failing_together():
            if host.is_main_process:
                _write(found, predictions=predictions, report=report, pictures=pictures)
                if log:
                    _log(found, model, tracking_uri)


def _log(found: EvaluationReport, model: TrainedModel, tracking_uri: str) -> None:
    """Log the metrics as `test_...`, and the plots. Main process only.

    Raises:
        DetrDistError: MLflow cannot be reached.
    """
    from detr_dist.evaluation.plots import write_plots  # imports matplotlib, which is slow
    from detr_dist.tracking.tested_models import ModelOrigin, log_test  # imports MLflow, which is slow

    assert found.details is not None  # on the main process
    data, metadata = found.details.data, model.metadata
    origin = ModelOrigin(model.reference, metadata.get("run_id"), metadata.get("epoch"), metadata.get("step"))
    metrics = {f"test_{name.removeprefix('val_')}": value for name, value in found.metrics.items()}
    with tempfile.TemporaryDirectory() as scratch:
        plots = Path(scratch, "plots")
        for failure in write_plots(plots, data, found.details):
            _logger.warning(f"{printable(failure)}; not drawn")
        experiment = model.config.logging.mlflow_experiment_name
        run_id = log_test(origin, metrics, data, plots, tracking_uri=tracking_uri, experiment=experiment)
    print(f"MLflow run {run_id} at {redact(tracking_uri)}: test_map and the other metrics, and plots")


def _check_outputs(predictions: Path | None, report: Path | None, pictures: Path | None) -> None:
    """Check, before hours of work, that the output files can be written."""
    for name, path in (("--predictions", predictions), ("--report", report)):
        if path is not None:
            check_writable(name, path.parent)
            if path.is_dir():
                raise UsageError(f"{name} {path}: is a folder; give the path of a file to write")
    if pictures is not None:
        check_writable("--pictures", pictures.parent)
        check_new("--pictures", pictures)


def _write(
    found: EvaluationReport, *, predictions: Path | None, report: Path | None, pictures: Path | None
) -> None:
    """Print the table and write the requested files. Main process only."""
    assert found.details is not None  # on the main process
    data = found.details.data
    num_boxes = found.confusion[:-1].sum(axis=1).tolist()  # each box is matched or a false negative
    size_bands = found.facts["config"]["evaluation"]["size_bands"]
    print("\n".join(metrics_table(found.metrics, found.class_names, num_boxes, size_bands)))
    meaning = {"auto": "the best for these data", "model": "those saved with the model"}
    print(f"thresholds: {meaning.get(found.facts['thresholds'], found.facts['thresholds'])}", flush=True)
    if predictions is not None:
        results = coco_results(data, found.details.records)
        write_text(predictions, json.dumps(results))
        print(f"{predictions}: {len(results)} detections as COCO results")
    if report is not None:
        document = {"metrics": found.metrics, "class_names": found.class_names}
        document |= {"confusion": found.confusion.tolist(), "errors": _error_counts(found), **found.facts}
        write_text(report, json.dumps(document, indent=2) + "\n")
        print(f"{report}: the metrics, the confusion matrix, the errors, and how they were computed")
    if pictures is not None:
        from detr_dist.evaluation.plots import write_plots  # imports matplotlib, which is slow

        for failure in write_plots(pictures, data, found.details):
            _logger.warning(f"{printable(failure)}; not drawn")
        if pictures.exists():
            print(f"{pictures}: curves, confusion matrix and the images with most errors")


def _error_counts(found: EvaluationReport) -> dict[str, dict[str, int]]:
    """Return the number of errors of each kind, by class name."""
    assert found.details is not None
    counts = found.details.errors.counts.tolist()
    return {
        name: dict(zip(KINDS, own, strict=True)) for name, own in zip(found.class_names, counts, strict=True)
    }
