"""The README's first command, as a person runs it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CI"), reason="replaces models/quickstart of this checkout; runs in CI"
)
def test_the_quickstart_trains_evaluates_and_prints_where_the_results_are() -> None:
    finished = subprocess.run(
        ["bash", "scripts/quickstart.sh", "training.max_steps=2"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads((REPOSITORY / "models" / "quickstart" / "results.json").read_text())
    summary = finished.stdout.splitlines()[-40:]
    for name in ("val_map", "val_player_map", "val_ball_map"):
        assert f"{results['metrics'][name]:.3f}" in [
            line.split()[1] for line in summary if line.startswith(f"{name} ")
        ]
    assert any(
        f"{results['metrics']['val_f1']:.4f}" in line for line in summary if line.startswith("all classes")
    )
    assert any(results["run_id"] in line for line in summary)
    assert "start_mlflow_ui.sh sqlite:///mlflow.db" in summary[-1]
