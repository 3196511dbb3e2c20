"""The output folder and the tracked run: files of earlier runs, and the files of this one."""

import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from detr_dist.config import describe_keys, load_config
from detr_dist.data.coco import CocoData
from detr_dist.data.concatenation import parts_of
from detr_dist.data.repeat_factors import samples_of_parts
from detr_dist.errors import CheckpointError, UsageError
from detr_dist.evaluation.coco_metrics import METRICS_OF_CLASS, metric_names
from detr_dist.evaluation.metrics_table import metrics_table
from detr_dist.redaction import redact
from detr_dist.storage import new_folder, write_text
from detr_dist.text import list_names
from detr_dist.tracking.params import run_name, run_params
from detr_dist.tracking.tracker import TensorBoard, Trackers
from detr_dist.training.checkpoint import Checkpoint, claimed_age, is_checkpoint, open_checkpoint
from detr_dist.training.loop import TrainState
from detr_dist.training.setup import Setup

if TYPE_CHECKING:
    from detr_dist.tracking.mlflow import MLflowTracker

_logger = logging.getLogger(__name__)

_WRITTEN = {
    "": r"model|tensorboard|config\.yaml|results\.json",
    "checkpoints": r"\.?((epoch|step)_\d+|best|last)(\.partial|\.replaced|\.removed)?",
    "models": r"\.?epoch_\d+(\.partial|\.replaced|\.removed)?",
    "outbox": r"[0-9a-f]{32}",
    "logs": r"train(_from_step_\d+)?\.log",
    "pictures": r"\.?epoch_\d+(\.partial|\.replaced|\.removed)?",
    "stacks": r"rank_\d+\.txt|nccl_rank_\d+",
}
"""Patterns of the names that a run writes, by folder. Everything else in an output folder is the user's."""


NOTED_METRICS = {"val_map", "val_map_50", "val_precision", "val_recall", "val_f1"}
"""Metrics in the run's note and of registered versions, besides the AP of classes."""
MAX_NOTED_CLASSES = 12

_LATER_KEYS = {
    *("data.exif", "data.canvas_multiple", "data.resize", "data.multi_scale", "data.augmentation_off_epochs"),
    *("data.repeat_rare", "data.tiles", "data.copy_paste", "loss.class_weights", "evaluation.size_bands"),
    *("loss.weights", "training.tf32", "training.deterministic", "model.class_loss"),
    *("training.try_largest_batch", "training.extensions", "training.callbacks", "logging.trackers"),
    *("training.layer_decay", "training.learning_rate_decoder_factor", "training.lr_flat_share"),
    *("training.lr_final_factor", "training.warmup", "training.ema_warmup_steps", "training.sync_batch_norm"),
}
"""Settings that the first version did not have."""


def check_output(output_dir: Path) -> None:
    """Refuse a folder in which a run would replace the user's files.

    Raises:
        UsageError: the folder has files that a run would replace, but no trace of an earlier run.
    """
    there = [str(path.relative_to(output_dir)) for path in _of_runs(output_dir)]
    if there and not _holds_run(output_dir):
        raise UsageError(
            f"--output-dir {output_dir}: holds {list_names(there)}, which no run wrote, but which a run "
            "would replace; give another folder, or move them"
        )


def _of_runs(output_dir: Path) -> list[Path]:
    """Return the files with names that a run writes, and all checkpoints, as a run could resume from them."""
    return [
        path
        for folder, names in _WRITTEN.items()
        for path in sorted((output_dir / folder).glob("*"))
        if re.fullmatch(names, path.name) or (folder == "checkpoints" and is_checkpoint(path))
    ]


def _holds_run(output_dir: Path) -> bool:
    """Return whether a run has left a checkpoint, an outbox, stacks, or its resolved configuration."""
    traces = (
        *("checkpoints/*/state.json", "checkpoints/*/manifest.json", "checkpoints/.step_*.partial"),
        *("outbox/*/run.json", "stacks/rank_*"),
    )
    found = any(any(output_dir.glob(pattern)) for pattern in traces)
    return found or _is_resolved(output_dir / "config.yaml")


def _is_resolved(config_path: Path) -> bool:
    """Return whether the file has every setting except those of later versions: only runs write them all."""
    try:
        load_config(config_path)
        tree = yaml.safe_load(config_path.read_bytes())
    except (UsageError, yaml.YAMLError, ValueError, OSError):
        return False
    there = {f"{section}.{key}" for section, values in tree.items() for key in values or ()}
    return {key for key, _, _ in describe_keys()} - there <= _LATER_KEYS


def make_room(output_dir: Path, resumed: Checkpoint | None) -> None:
    """Move files that do not belong to the run that is about to start into `earlier_runs`.

    For a new run, or one whose checkpoint comes from elsewhere, these are all files but the outbox of the
    same run; otherwise the checkpoints that are newer than the resumed one, or unreadable.
    """
    checkpoints_dir = output_dir / "checkpoints"
    there = _of_runs(output_dir)
    if resumed is None or resumed.folder.parent.resolve() != checkpoints_dir.resolve():
        # Undelivered records of the same run must be delivered before new ones.
        leaving = [path for path in there if resumed is None or path.name != resumed.facts.mlflow_run_id]
        what = "an earlier run"
    else:
        checkpoints = [path for path in there if path.parent == checkpoints_dir]
        leaving = [path for path in checkpoints if claimed_age(path) > resumed.age]
        if checkpoints_dir / "best" in leaving and (output_dir / "model").exists():
            leaving.append(output_dir / "model")  # has the weights of a removed checkpoint
        what = f"checkpoints that are newer than step {resumed.state.step}, or corrupt"
    if leaving:
        aside = _unused(output_dir / "earlier_runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        for path in leaving:
            target = aside / path.relative_to(output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        for folder in {path.parent for path in leaving} - {output_dir}:
            with suppress(OSError):  # the folder has other files
                folder.rmdir()
        _logger.info(f"{output_dir} held {what}: moved to {aside}")
    (output_dir / "results.json").unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def bring_best(output_dir: Path, resumed: Checkpoint, best: Path, model: Path) -> None:
    """Copy the best checkpoint and model so far into an output folder that lacks them.

    Raises:
        CheckpointError: the best checkpoint is corrupt, or of another step than the best score.
    """
    checkpoint = open_checkpoint(best)
    if checkpoint.state.step != resumed.state.best_step:
        raise CheckpointError(
            f"{best}: is of step {checkpoint.state.step}, the best was {resumed.state.best_step}"
        )
    for source, target in ((best, output_dir / "checkpoints" / "best"), (model, output_dir / "model")):
        with new_folder(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)


class RunTrackers(Trackers):
    """All trackers of a run, with access to MLflow's, which can do more. Empty except on the main process."""

    mlflow: "MLflowTracker | None" = None

    @property
    def run_id(self) -> str | None:
        """Return the id of the run in MLflow, if it is tracked there."""
        return self.mlflow.run_id if self.mlflow is not None else None


def open_run(setup: Setup, trackers: RunTrackers) -> None:
    """Start or resume the MLflow run, and add it to the trackers. Main process only."""
    if not setup.config.logging.mlflow:
        return
    from detr_dist.tracking.mlflow import MLflowTracker  # imports MLflow, which is slow

    saved = setup.resumed.facts if setup.resumed is not None else None
    trackers.mlflow = MLflowTracker(
        setup.config.logging,
        run_id=saved.mlflow_run_id if saved is not None else None,
        known_uri=saved.config.logging.mlflow_tracking_uri if saved is not None else None,
        default_name=run_name(setup.config, setup.detector, setup.train_data, setup.output_dir),
        table_metrics=[
            "val_map",
            *(f"val_{name}_map" for name in metric_names(setup.train_data.class_names)),
        ],
    )
    trackers.add(trackers.mlflow)


def open_output(setup: Setup, trackers: RunTrackers) -> None:
    """Write the run's first files and open its trackers. Main process only."""
    output_dir, config, resumed = setup.output_dir, setup.config, setup.resumed
    make_room(output_dir, resumed)
    if resumed is not None and resumed.state.best_step is not None and not (output_dir / "model").exists():
        _bring_best_of(setup, resumed)
    (output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    if trackers.mlflow is not None:
        trackers.mlflow.open(output_dir / "outbox")
        if resumed is not None:
            trackers.mlflow.note_resume(resumed.state.step, setup.changes)
        hosts = ", ".join(setup.host_names)
        trackers.mlflow.set_tags({"host_names": hosts, "num_processes": str(setup.host.num_processes)})
        for source in parts_of(setup.train_data):
            trackers.mlflow.log_datasets({"train": source})
        trackers.mlflow.log_datasets({"validation": setup.val_data})
    if config.logging.tensorboard:
        first_step = resumed.state.step if resumed is not None else 0
        trackers.add(TensorBoard(output_dir / "tensorboard", first_step=first_step))
    trackers.write_log(_log_path(output_dir, resumed))
    trackers.log_file(output_dir / "config.yaml")
    trackers.log_params(
        run_params(config, setup.detector, setup.train_data, setup.val_data, setup.plan, setup.samples)
    )
    _log_where(setup, trackers)


def _log_path(output_dir: Path, resumed: Checkpoint | None) -> Path:
    """Return the path of the log, a new name if the earlier log is not here, but may be in MLflow."""
    path = output_dir / "logs" / "train.log"
    if resumed is None or path.exists():
        return path
    return path.with_name(f"train_from_step_{resumed.state.step}.log")


def _bring_best_of(setup: Setup, resumed: Checkpoint) -> None:
    """Copy the best model so far from beside the resumed checkpoint, or from MLflow."""
    try:
        best, model = resumed.folder.parent / "best", resumed.folder.parent.parent / "model"
        is_here = best.exists() and model.exists()
        if not is_here and setup.config.logging.mlflow and resumed.facts.mlflow_run_id is not None:
            of_run = f"runs:/{resumed.facts.mlflow_run_id}"
            best = setup.sources.download(f"{of_run}/checkpoints/best")
            model = setup.sources.download(f"{of_run}/model")
        bring_best(setup.output_dir, resumed, best, model)
    except (CheckpointError, UsageError, OSError) as error:
        _logger.warning(f"the best model so far could not be copied ({error})")


def _epoch(setup: Setup) -> dict[str, Any]:
    """Return the steps of every epoch, and the sources of its samples."""
    counts = samples_of_parts(setup.train_data, setup.samples)
    sources = [
        {"annotations": str(part.annotations_path), "images": len(part), "samples": count}
        for part, count in zip(parts_of(setup.train_data), counts, strict=True)
    ]
    return {"steps": setup.plan.steps_per_epoch, "samples": setup.plan.num_samples, "sources": sources}


def _log_where(setup: Setup, trackers: RunTrackers) -> None:
    """Log where the run is in MLflow, and how to open it."""
    if (mlflow := trackers.mlflow) is None:
        return
    experiment = setup.config.logging.mlflow_experiment_name
    _logger.info(f"MLflow run {mlflow.run_id} in experiment {experiment} ({redact(mlflow.uri)})")
    for line in mlflow.ways_to_see():
        _logger.info(line)


def _facts_of_best(setup: Setup, state: TrainState) -> dict[str, Any]:
    """Return what a registered version says about its model: epoch, step, classes and metrics."""
    if state.best_step is None:
        return {}
    path, metrics = setup.output_dir / "model" / "MLmodel", dict[str, float]()
    if path.exists():  # a resumed run may lack the best model of before
        metrics = yaml.safe_load(path.read_text(encoding="utf-8"))["metadata"]["metrics"]
    return {
        "epoch": -(-state.best_step // setup.plan.steps_per_epoch),
        "step": state.best_step,
        "classes": ", ".join(setup.train_data.class_names),
        **_headline_metrics(metrics, setup.train_data.class_names),
        "val_map": state.best_map,
    }


def _headline_metrics(metrics: Mapping[str, float], class_names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of all classes together, and the AP of the first classes."""
    of_classes = [f"val_{name}_map" for name in metric_names(class_names)[:MAX_NOTED_CLASSES]]
    names = [*(name for name in metrics if name in NOTED_METRICS), *(n for n in of_classes if n in metrics)]
    return {name: metrics[name] for name in names}


def log_results(trackers: RunTrackers, data: CocoData, state: TrainState) -> None:
    """Log the metrics of each class of `data` as a table, and update the run's note. Main process only."""
    names = data.class_names
    rows = [
        [name, boxes, *(state.metrics.get(f"val_{key}_{metric}") for metric in METRICS_OF_CLASS)]
        for name, boxes, key in zip(names, data.boxes_per_class.tolist(), metric_names(names), strict=True)
    ]
    trackers.log_table("per_class", ["class", "boxes", *METRICS_OF_CLASS], rows, state.step)
    if trackers.mlflow is not None:
        best = f"Best so far: `val_map` **{state.best_map:.4f}** at step {state.best_step}."
        trackers.mlflow.write_note(best, _headline_metrics(state.metrics, names))


def leave_results(setup: Setup, state: TrainState, trackers: RunTrackers) -> None:
    """Log the last evaluation and the best model, write `results.json`, and register the model.

    Main process only.
    """
    metrics, val_data = state.metrics, setup.val_data
    if metrics:
        bands, num_boxes = setup.config.evaluation.size_bands, val_data.boxes_per_class.tolist()
        for line in metrics_table(metrics, val_data.class_names, num_boxes, bands):
            _logger.info(line)
    if state.best_map is not None:
        model_dir = setup.output_dir / "model"
        _logger.info(f"best model: {model_dir}, val_map {state.best_map:.4f} at step {state.best_step}")
    mlflow, settings = trackers.mlflow, setup.config.logging
    where = {"run_id": mlflow.run_id, "tracking_uri": redact(mlflow.uri)} if mlflow is not None else {}
    results = {"metrics": metrics, **where, "epoch": _epoch(setup)}
    write_text(setup.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if mlflow is not None:
        if settings.register_model_as is not None:
            mlflow.register_model(settings.register_model_as, **_facts_of_best(setup, state))
        _log_where(setup, trackers)
