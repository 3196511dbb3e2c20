"""Compare the losses of the first 20 steps with and without each option that only saves time or memory.

    python scripts/benchmarks/same_losses.py [--config configs/quickstart.yaml] [--device cuda] [--json FILE]

Trains with the real command on generated scenes, once as configured and once with each option. Differences in
rounding grow from step to step; prints the relative difference at the first step and the largest one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from timing import command_line, publish

from detr_dist.data.synthetic import make_data

REPOSITORY = Path(__file__).parents[2]
NUM_STEPS = 20
OPTIONS: dict[str, list[str]] = {
    "as configured": [],
    "again": [],
    "training.channels_last": ["training.channels_last=true"],
    "training.gradient_checkpointing": ["training.gradient_checkpointing=true"],
    "training.compile_model": ["training.compile_model=true"],
    "data.num_workers": ["data.num_workers=2"],
    "checkpoint.every_steps": ["checkpoint.every_steps=3"],
    "training.mixed_precision bf16": ["training.mixed_precision=bf16"],
}


def losses(folder: Path, config: Path, device: str, name: str, options: list[str]) -> list[float]:
    """Return the loss of each step."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    settings = [
        f"training.max_steps={NUM_STEPS}",
        "logging.log_every_steps=1",
        "evaluation.pictures=false",
        f"logging.mlflow_tracking_uri={uri}",
        f"logging.mlflow_experiment_name={name}",
    ]
    command = [sys.executable, "-m", "detr_dist", "train", "--config", config]
    command += ["--train-dir", folder / "train", "--val-dir", folder / "val", "--output-dir", folder / name]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    finished = subprocess.run(
        [*command, *settings, *options], env=os.environ | hidden, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"{name}: {finished.stderr}")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return [metric.value for metric in client.get_metric_history(run.info.run_id, "train_loss")]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "quickstart.yaml")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), num_train=64, num_val=4, seed=0)
        found = {
            name: losses(Path(folder), options.config, options.device, f"run_{number}", overrides)
            for number, (name, overrides) in enumerate(OPTIONS.items())
        }
    expected = found.pop("as configured")
    rows = []
    for name, values in found.items():
        apart = [abs(value / wanted - 1) for value, wanted in zip(values, expected, strict=True)]
        rows.append({"option": name, "first step": apart[0], "largest": max(apart)})
    publish(rows, options.json, loss_first_step=expected[0], loss_last_step=expected[-1])


if __name__ == "__main__":
    main()
