"""The benchmarks measure what users train, and the GPU check works without a GPU."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.data import RESNET_FAMILIES
from torch import nn

from detr_dist.config import load_config
from detr_dist.models.build import build_detector

BENCHMARKS = Path(__file__).parents[2] / "scripts" / "benchmarks"
ON_THE_CPU = (
    *("environment", "data", "bf16", "boxes", "command", "float32", "canvases"),
    *("evaluate", "split", "resume", "deterministic"),
)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_check
    import gpu_check_findings
    import small_objects
    import train_step

    return SimpleNamespace(
        check=gpu_check, findings=gpu_check_findings, train_step=train_step, small_objects=small_objects
    )


@pytest.mark.slow
@pytest.mark.timeout(300)  # a minute where nothing else runs
def test_every_step_of_the_gpu_check_runs_or_reports_why_not(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        ["bash", BENCHMARKS / "gpu_check.sh", BENCHMARKS.parents[1], tmp_path],
        env=environment | {"TOTAL_S": "280"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = finished.stdout.splitlines()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert lines == (tmp_path / "summary.txt").read_text().splitlines()
    results = {line.split()[1]: line for line in lines}
    assert [name for name, line in results.items() if line.startswith("PASS")] == [*ON_THE_CPU]
    skipped = [line for line in lines if not line.startswith("PASS")]
    assert len(skipped) > 5
    assert all(line.startswith("SKIP") and ": no GPU: " in line for line in skipped)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == list(results)
    assert {"step_ms", "images_per_s", "bare_ms", "library_ms", "TFLOPS"} <= figures["bf16"].keys()
    assert figures["bf16"]["tf32"] is True
    assert figures["float32"]["tf32"] is False
    assert figures["boxes"]["bf16_pixels_apart"] < 0.3
    assert 0 <= figures["command"]["data_wait_share"] <= 1
    assert figures["evaluate"]["loss_apart"] == 0
    assert figures["split"]["float32_losses_apart"] < 1e-4
    assert figures["resume"]["losses_apart"] == figures["deterministic"]["deterministic_losses_apart"] == 0


def test_a_gpu_check_step_that_fails_hangs_or_dies_is_one_line(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(check) -> None:
        check.figures(seconds=1.5)
        check.expect(False, "slow")

    def hang(check) -> None:
        check.figures(began=True)
        time.sleep(60)

    def die(check) -> None:
        os.kill(os.getpid(), 9)

    def raise_error(check) -> None:
        raise ValueError("no such thing")

    def skip(check) -> None:
        check.needs_gpu("nothing to measure")

    steps = [benchmarks.check.Step(run.__name__, 12, run) for run in (fail, hang, die, raise_error, skip)]
    monkeypatch.setattr(benchmarks.check, "LEAST_S", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = argparse.Namespace(out=tmp_path, repository=tmp_path, seconds=3)
    assert benchmarks.check.run_all(steps, options) == 1
    lines = [line.split("): ") for line in (tmp_path / "summary.txt").read_text().splitlines()]
    lines[1][1] = lines[1][1].replace("after 2 s", "after 3 s")  # less what the first step took
    assert [(line[0].split(" (")[0], line[1]) for line in lines] == [
        ("FAIL fail", "slow; seconds 1.5"),
        ("FAIL hang", "stopped after 3 s; began True"),
        ("SKIP die", "no time left"),
        ("SKIP raise_error", "no time left"),
        ("SKIP skip", "no time left"),
    ]
    options.seconds = 100
    assert benchmarks.check.run_all([step for step in steps if step.name != "hang"], options) == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split("): ")[1] for line in lines[1:]] == [
        "it ended without a message",
        "ValueError: no such thing",
        "no GPU: nothing to measure",
    ]


def test_activations_of_all_architectures_are_counted_without_a_gpu(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import activations
    from gpu_check_network import SMALL

    path = tmp_path / "activations.json"
    small = [setting for setting in SMALL if setting.startswith("model.")]
    small += ["model.hidden_dim=64", "model.backbone.out_features=[stage2, stage3, stage4]"]
    monkeypatch.setattr(
        sys, "argv", ["activations.py", "--size-hw", "96", "128", "--json", str(path), *small]
    )
    activations.main()
    rows = {row["MiB an image"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == set(RESNET_FAMILIES)
    assert rows["detr"]["bf16"] < 0.8 * rows["detr"]["float32"]
    assert all(row["float32 checkpointing"] < row["float32"] for row in rows.values())


def test_on_a_gpu_the_benchmark_trains_the_network_that_users_train(benchmarks, tmp_path: Path) -> None:
    options = argparse.Namespace(device="cuda", config=None, overrides=[])
    config = benchmarks.train_step.configure(options, tmp_path)
    assert config.training.batch_size == 8
    detector = build_detector(config.model, ["player", "ball"])
    norms = [module for module in detector.modules() if "BatchNorm2d" in type(module).__name__]
    assert norms
    assert not any(isinstance(norm, nn.BatchNorm2d) for norm in norms)
    body = detector.network.model.backbone.model
    assert {n.split(".")[0] for n, p in body.named_parameters() if p.requires_grad} == {
        "layer2",
        "layer3",
        "layer4",
    }
    with torch.no_grad():
        boxes = detector.eval()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert bool(torch.isfinite(boxes["pred_boxes"]).all())


def test_the_comparison_of_small_objects_has_valid_variants_and_reports_mean_and_range(benchmarks) -> None:
    compared = benchmarks.small_objects
    for variant in compared.VARIANTS.values():
        config = load_config(compared.CONFIG, [*compared.COMMON, *variant.overrides])
        assert not config.logging.mlflow
    runs = [
        {"name": "tiles", "steps": 9, "train_s": 8.0, "val_ball_recall": value} for value in (0.2, 0.3, 0.7)
    ]
    (row,) = compared.summary(runs)
    assert row["ball_recall"] == "0.400 (0.200-0.700)"
    assert row["ball_map_25"] == "0.000 (0.000-0.000)", "without detections"
    assert (row["seeds"], row["steps"]) == (3, 9)
