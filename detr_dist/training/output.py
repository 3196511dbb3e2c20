"""The output folder of a run: what an earlier one left there, and what this one leaves."""

import itertools
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from detr_dist.errors import CheckpointError
from detr_dist.training.checkpoint import Checkpoint, claimed_age, open_checkpoint
from detr_dist.training.durable import new_folder, write_text_whole

OF_A_RUN = (
    "checkpoints",
    "model",
    "models",
    "outbox/*",
    "pictures",
    "stacks",
    "tensorboard",
    "config.yaml",
    "results.json",
)


def make_room(output_dir: Path, resumed: Checkpoint | None) -> None:
    """Set aside, within the output folder, what does not belong to the run that is about to go on.

    For a new run, or one whose checkpoint comes from elsewhere, that is everything but the outbox of the same
    run; otherwise the checkpoints that are newer than the resumed one, or do not tell.
    """
    checkpoints_dir = output_dir / "checkpoints"
    if resumed is None or resumed.folder.parent.resolve() != checkpoints_dir.resolve():
        there = (path for pattern in OF_A_RUN for path in sorted(output_dir.glob(pattern)))
        # What the same run has not delivered comes before what it logs from now on, or never.
        leaving = [path for path in there if resumed is None or path.name != resumed.facts.mlflow_run_id]
        what = "an earlier run"
    else:
        leaving = [path for path in checkpoints_dir.iterdir() if claimed_age(path) > resumed.age]
        if checkpoints_dir / "best" in leaving and (output_dir / "model").exists():
            leaving.append(output_dir / "model")  # made of the same weights
        what = f"checkpoints that are newer than step {resumed.state.step}, or not whole"
    if leaving:
        aside = _unused(output_dir / "earlier_runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))
        for path in leaving:
            target = aside / path.relative_to(output_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        print(f"{output_dir} held {what}: moved to {aside}", flush=True)
    (output_dir / "results.json").unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    numbered = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def bring_best(output_dir: Path, resumed: Checkpoint, best: Path, model: Path) -> None:
    """Copy the best checkpoint and model so far into an output folder that lacks them, if these are they.

    Raises:
        CheckpointError: the best checkpoint is not whole, or is of another step.
    """
    checkpoint = open_checkpoint(best)
    if checkpoint.state.step != resumed.state.best_step:
        raise CheckpointError(
            f"{best}: is of step {checkpoint.state.step}, the best was {resumed.state.best_step}"
        )
    for source, target in ((best, output_dir / "checkpoints" / "best"), (model, output_dir / "model")):
        with new_folder(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)


def write_results(output_dir: Path, metrics: dict[str, float], where: Mapping[str, str]) -> None:
    """Print the last evaluation and leave it in `results.json`, with where the run is to be found."""
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4f}")
    results = {"metrics": metrics, **where}
    write_text_whole(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
