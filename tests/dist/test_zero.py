"""ZeRO gives the results of DDP and of one process, and saves complete files in the standard format.

Uses real DeepSpeed over gloo and the shipped files of `accelerate launch`. All runs see the same 8 images a
step.
"""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload")
STAGES = {"deepspeed_zero1": 1, "deepspeed_zero2": 2, "deepspeed_zero3": 3, "deepspeed_zero2_offload": 2}
STEPS = 10
COMMON = (
    f"training.max_steps={STEPS}",
    "training.num_epochs=9",
    "training.lr_schedule=cosine",  # another learning rate in every step
    "training.warmup_steps=4",
    "training.gradient_clip=0.1",
    "training.layer_decay=0.8",  # many parameter groups
    "model.dropout=0",
    "model.freeze_batch_norm=true",
    "data.augmentation=detr",
)
AVERAGED = "training.ema_decay=0.9"
WHOLE = ("training.batch_size=8", "training.gradient_accumulation_steps=1")
HALVES = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
QUARTERS = ("training.batch_size=2", "training.gradient_accumulation_steps=2")  # per process of two
# A fraction of the change of the last five steps. It allows for rounding: AdamW takes a full step even where a gradient
# is nearly zero (1e-9 in the first decoder layer). Measured: 0.001 for DDP against one process, 0.008 for offloading;
# a real difference, such as no clipping, gives 1.8.
WEIGHTS_TOLERANCE = 0.03
LOSSES = tuple(f"train_{loss}" for loss in ("loss", "loss_ce", "loss_bbox", "loss_giou"))
METRICS = (*LOSSES, "learning_rate", "val_loss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """Run ten steps each with `one` process, with `ddp` in two, and with each ZeRO file in two.

    Only `deepspeed_zero2` does not accumulate.
    """
    place = new_workplace(tmp_path_factory.mktemp("zero"))

    def train(output: str, *overrides: str, launch_config: str = "multi_cpu", num_processes: int = 2) -> None:
        finished = place.train(
            tiny_data,
            *COMMON,
            AVERAGED,
            "checkpoint.every_steps=5",
            *overrides,
            output=output,
            num_processes=num_processes,
            launch_config=launch_config,
        )
        assert finished.returncode == 0, (output, finished.stdout + finished.stderr)

    train("one", *WHOLE, num_processes=1)
    train("unclipped", *WHOLE, "training.gradient_clip=0", num_processes=1)
    train("ddp", *QUARTERS)
    for name in ZERO:
        train(name, *(HALVES if name == "deepspeed_zero2" else QUARTERS), launch_config=name)
    return place


def is_same(first: Path, second: Path) -> bool:
    found, other = load_file(first), load_file(second)
    return found.keys() == other.keys() and all(torch.equal(found[key], other[key]) for key in found)


def difference(runs, output: str, other: str, name: str) -> float:
    """Return how much the final weights differ, as a fraction of the change of the last five steps."""

    def weights(run: str, checkpoint: str) -> torch.Tensor:
        tensors = load_file(runs.folder / run / "checkpoints" / checkpoint / name)
        floats = [tensor.flatten() for _, tensor in sorted(tensors.items()) if tensor.is_floating_point()]
        return torch.cat(floats).double()

    end = weights(other, "last")
    return float((weights(output, "last") - end).norm() / (end - weights(other, "step_5")).norm())


def last(runs, output: str) -> Path:
    return runs.folder / output / "checkpoints" / "last"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ZERO)
def test_each_zero_stage_gives_the_results_of_ddp_and_of_one_process(runs, name: str) -> None:
    for other in ("ddp", "one"):
        for metric in METRICS:
            # Sums in another order, and convolutions over other batch sizes: float32 rounding, nothing more.
            assert runs.history(metric, name) == [
                (step, pytest.approx(value, rel=1e-4, abs=1e-7)) for step, value in runs.history(metric, other)
            ], (metric, other)
        for weights in ("model.safetensors", "ema.safetensors"):
            assert difference(runs, name, other, weights) < WEIGHTS_TOLERANCE, (other, weights)
    assert difference(runs, "unclipped", "one", "model.safetensors") > 1
    state = json.loads((last(runs, name) / "state.json").read_text())
    assert (state["zero_stage"], state["num_processes"], state["step"]) == (STAGES[name], 2, STEPS)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ZERO)
def test_the_mlflow_model_of_a_zero_run_has_all_trained_weights(
    runs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(runs.folder)
    mlflow.set_tracking_uri(f"sqlite:///{runs.folder / 'mlflow.db'}")
    model = mlflow.pytorch.load_model(f"runs:/{runs.results(name)['run_id']}/model")
    trained = load_file(runs.folder / name / "checkpoints" / "best" / "ema.safetensors")
    loaded = model.state_dict()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, trained[key]), key


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_resumed_zero_run_equals_the_uninterrupted_run_bit_for_bit(
    runs, tiny_data: Path, name: str
) -> None:
    output = f"{name}_resumed"
    finished = runs.train(
        tiny_data,
        *COMMON,
        AVERAGED,
        *(HALVES if name == "deepspeed_zero2" else QUARTERS),
        "logging.mlflow=false",
        "--resume",
        f"{name}/checkpoints/step_5",
        output=output,
        num_processes=2,
        launch_config=name,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "at step 5," in finished.stdout
    for weights in ("model.safetensors", "ema.safetensors"):
        assert is_same(last(runs, output) / weights, last(runs, name) / weights), weights
    found, expected = (
        torch.load(last(runs, each) / "optimizer.pt", weights_only=True)["optimizer"] for each in (output, name)
    )
    assert found.keys() == expected.keys()
    for index, state in expected.items():
        for what, tensor in state.items():
            assert torch.equal(found[index][what], tensor), (index, what)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("source", "launch_config", "num_processes"),
    [
        pytest.param("deepspeed_zero3", "multi_cpu", 1, id="two processes of stage 3, then one process"),
        pytest.param("one", "deepspeed_zero2_offload", 2, id="one process, then two that offload"),
    ],
)
def test_a_resumed_run_may_change_num_processes_and_zero_stage(
    runs, tiny_data: Path, source: str, launch_config: str, num_processes: int
) -> None:
    output = f"{source}_then_{launch_config}"
    finished = runs.train(
        tiny_data,
        *COMMON,
        AVERAGED,
        *(WHOLE if num_processes == 1 else QUARTERS),
        "logging.mlflow=false",
        "--resume",
        f"{source}/checkpoints/step_5",
        output=output,
        num_processes=num_processes,
        launch_config=launch_config,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "changed since: ZeRO stage" in finished.stdout
    for weights in ("model.safetensors", "ema.safetensors"):
        # A lost optimizer state would differ as much as the change itself.
        assert difference(runs, output, "one", weights) < WEIGHTS_TOLERANCE, weights


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_ema_stage_3_evaluates_and_saves_the_trained_weights(
    runs, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use bfloat16, trained batch norm, a family whose layers share weights, and the launcher itself."""
    finished = runs.launch(
        *("-m", "detr_dist", *runs._training(tiny_data, "bf16")),
        "model.model_architecture=deformable_detr",
        "model.config_overrides.num_feature_levels=1",
        "model.config_overrides.with_box_refine=true",
        "training.mixed_precision=bf16",
        "training.max_steps=3",
        "evaluation.every_epochs=1",
        num_processes=2,
        launch_config="deepspeed_zero3",
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    trained = load_file(last(runs, "bf16") / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values() if tensor.is_floating_point()} == {torch.float32}
    monkeypatch.chdir(runs.folder)
    mlflow.set_tracking_uri(f"sqlite:///{runs.folder / 'mlflow.db'}")
    loaded = mlflow.pytorch.load_model(f"runs:/{runs.results('bf16')['run_id']}/model").state_dict()
    for key in trained.keys() & loaded.keys():
        assert torch.equal(loaded[key], trained[key]), key
    alone = runs.run(
        *("evaluate", "--model", "bf16/model", "--data-dir", tiny_data / "val", "--report", "report.json")
    )
    assert alone.returncode == 0, alone.stderr
    evaluated = json.loads((runs.folder / "report.json").read_text())["metrics"]
    logged = runs.results("bf16")["metrics"]
    # The same weights on other batches: bfloat16 rounds to three digits.
    assert logged["val_loss"] == pytest.approx(evaluated["val_loss"], rel=1e-2)
