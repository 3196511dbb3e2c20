"""A real run, as MLflow and the output folder show it."""

import json
import re
import shutil
import socket
from pathlib import Path

import mlflow
import pytest
import torch
from transformers import pipeline

from detr_dist.config import load_config
from detr_dist.config_tiles import Tiles
from detr_dist.evaluation.error_analysis import KINDS
from detr_dist.inference.model import load_model

GUIDE_PARAMS = {
    "batch_size",
    "learning_rate",
    "num_epochs",
    "weight_decay",
    "gradient_clip",
    "gradient_accumulation_steps",
    "mixed_precision",
    "compile_model",
    "channels_last",
    "model_architecture",
    "backbone",
    "num_classes",
    "hidden_dim",
    "num_encoder_layers",
    "num_decoder_layers",
    "train_samples",
    "val_samples",
    "num_workers",
    "prefetch_factor",
}
GUIDE_VAL_METRICS = {
    f"val_{of}{metric}" for of in ("", "player_", "ball_") for metric in ("map", "precision", "recall", "f1")
}
GUIDE_METRICS = {
    "train_loss",
    "train_loss_ce",
    "train_loss_bbox",
    "train_loss_giou",
    "learning_rate",
    "memory_ram_gb",
    *GUIDE_VAL_METRICS,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path):
    """Train two epochs in two processes, evaluated and saved each, with TensorBoard and loaders."""
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    finished = place.train(
        tiny_data,
        "training.num_epochs=2",
        "evaluation.every_epochs=1",
        "checkpoint.every_epochs=1",
        "logging.tensorboard=true",
        "logging.memory_every_steps=2",
        "logging.register_model_as=players_and_balls",
        "data.num_workers=1",
        "training.batch_size=5",
        num_processes=2,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return place, finished.stdout


@pytest.fixture(scope="module")
def mlflow_run(trained):
    place, _ = trained
    mlflow.set_tracking_uri(f"sqlite:///{place.folder / 'mlflow.db'}")
    return mlflow.get_run(place.results()["run_id"])


def artifacts(run: mlflow.entities.Run, path: str | None = None) -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, path)}


def test_two_processes_create_one_finished_run(trained, mlflow_run) -> None:
    assert len(mlflow.search_runs(experiment_names=["detr_training"])) == 1
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params["num_processes"] == "2"
    assert mlflow_run.data.params["global_batch_size"] == "10"


def test_params_and_metrics_have_the_documented_names(mlflow_run) -> None:
    assert set(mlflow_run.data.params) >= GUIDE_PARAMS
    assert set(mlflow_run.data.metrics) >= GUIDE_METRICS
    assert mlflow_run.data.params["batch_size"] == "5"
    assert mlflow_run.data.params["mixed_precision"] == "no"  # what auto becomes on the CPU
    assert mlflow_run.data.params["tf32"] == "True"
    assert mlflow_run.data.params["backbone"] == "resnet"
    assert mlflow_run.data.params["hidden_dim"] == "32"
    assert mlflow_run.data.params["train_samples"] == "40"


def test_every_metric_is_stored_once_per_logged_step(trained) -> None:
    place, _ = trained
    for metric in ("train_loss", "learning_rate", "epoch"):
        assert [step for step, _ in place.history(metric)] == list(range(1, 9))
    assert [step for step, _ in place.history("val_map")] == [4, 8]
    assert [step for step, _ in place.history("memory_ram_gb")] == [2, 4, 6, 8]
    assert [step for step, _ in place.history(f"memory_machine_gb/{socket.gethostname()}")] == [2, 4, 6, 8]
    assert place.history("epoch")[3:5] == [(4, 1.0), (5, 1.25)]


def test_on_the_cpu_one_line_states_that_no_gpu_metrics_are_logged(trained, mlflow_run) -> None:
    _, stdout = trained
    assert stdout.count("no GPU metrics from the NVIDIA driver") == 1
    assert not [name for name in mlflow_run.data.metrics if "gpu" in name]


def test_each_evaluation_prints_a_short_line_and_the_last_one_a_full_table(trained) -> None:
    place, stdout = trained
    (line, _) = [line for line in stdout.splitlines() if "evaluation after step" in line]
    shown = {word for word in line.split() if word.startswith("val_")}
    assert shown == {
        "val_map", "val_player_map", "val_ball_map", "val_map_50", "val_precision", "val_recall", "val_f1"
    }  # fmt: skip
    metrics = place.results()["metrics"]
    for name, prefix in {"player": "val_player_", "ball": "val_ball_", "all classes": "val_"}.items():
        keys = [prefix + key for key in ("map", "precision", "recall", "f1", "threshold")]
        values = " +".join(f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys)
        assert re.search(rf"^{name} +\d+ +{values}$", stdout, re.MULTILINE), name
    for name, value in metrics.items():
        assert f" {value:.4f}" in stdout, name


def test_a_configured_score_threshold_applies_to_every_class(workplace, tiny_data: Path) -> None:
    finished = workplace.train(
        tiny_data, "training.max_steps=1", "logging.mlflow=false", "evaluation.score_threshold=0"
    )
    assert finished.returncode == 0, finished.stderr
    metrics = workplace.results()["metrics"]
    assert (metrics["val_player_threshold"], metrics["val_ball_threshold"]) == (0, 0)
    state = json.loads((workplace.folder / "out" / "checkpoints" / "best" / "state.json").read_text())
    assert state["metrics"] == metrics


def test_checkpoints_and_models_are_artifacts(mlflow_run) -> None:
    assert artifacts(mlflow_run) == {
        "checkpoints", "config.yaml", "logs", "model", "models", "per_class.json"
    }  # fmt: skip
    assert artifacts(mlflow_run, "logs") == {"logs/train.log"}
    assert artifacts(mlflow_run, "models") == {"models/epoch_1", "models/epoch_2"}
    assert artifacts(mlflow_run, "checkpoints") == {
        "checkpoints/best", "checkpoints/epoch_1", "checkpoints/epoch_2", "checkpoints/last"
    }  # fmt: skip
    assert artifacts(mlflow_run, "checkpoints/best") == {
        f"checkpoints/best/{name}"
        for name in ("config.json", "manifest.json", "model.safetensors", "optimizer.pt", "state.json")
    }


@pytest.mark.parametrize("path", ["model", "models/epoch_1"])
def test_a_model_loads_from_mlflow_as_a_torch_module_with_its_metadata(path: str, mlflow_run) -> None:
    uri = f"runs:/{mlflow_run.info.run_id}/{path}"
    model = mlflow.pytorch.load_model(uri)
    assert type(model).__module__.startswith("transformers.")
    with torch.no_grad():
        assert model(pixel_values=torch.rand(1, 3, 64, 64)).logits.shape == (1, 8, 3)
    info = mlflow.models.get_model_info(uri)
    assert info.flavors.keys() == {"python_function", "pytorch"}
    metadata = info.metadata
    assert metadata["epoch"] in (1, 2)
    assert metadata["config"]["training"]["batch_size"] == 5


def test_the_best_model_is_registered_with_an_alias(mlflow_run) -> None:
    version = mlflow.MlflowClient().get_model_version_by_alias("players_and_balls", "best")
    assert version.run_id == mlflow_run.info.run_id
    model = mlflow.pytorch.load_model("models:/players_and_balls@best")
    assert model.config.id2label == {0: "player", 1: "ball"}


def test_the_run_records_its_data_sets_hosts_and_command(mlflow_run) -> None:
    datasets = {each.tags[0].value: each.dataset for each in mlflow_run.inputs.dataset_inputs}
    assert {context: dataset.name for context, dataset in datasets.items()} == {
        "train": "train", "validation": "val"
    }  # fmt: skip
    assert json.loads(datasets["train"].profile)["num_images"] == 40
    assert mlflow_run.data.tags["host_names"] == socket.gethostname()
    assert mlflow_run.data.tags["num_processes"] == "2"
    assert "train" in mlflow_run.data.tags["launch_command"]


def test_the_output_folder_has_the_documented_files(trained) -> None:
    place, stdout = trained
    out = place.folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "checkpoints", "config.yaml", "logs", "model", "outbox", "results.json", "tensorboard"
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    of_coco = {"map_50", "map_75", "map_small", "mar_1", "mar_10", "mar_100"}  # no box is larger
    losses = {"loss", "loss_ce", "loss_bbox", "loss_giou"}
    small = {f"{of}{name}" for of in ("", "player_", "ball_") for name in ("map_25", "recall_p95")}
    small |= {"map_center", "player_center_map", "ball_center_map"}
    errors = {f"{of}error_{kind}_dap" for of in ("", "player_", "ball_") for kind in KINDS}
    expected = GUIDE_VAL_METRICS | {f"val_{name}" for name in of_coco | losses | small | errors}
    optional = re.compile(r".*_(threshold|threshold_p95|calibration_error)")  # without detections
    assert {name for name in results["metrics"] if not optional.fullmatch(name)} == expected
    assert results["run_id"] in stdout
    assert "step 8/8" in stdout
    assert "data wait" in stdout
    assert list((out / "tensorboard").rglob("events.out.tfevents.*"))


def test_a_transformers_pipeline_runs_on_the_model_folder_offline(trained, tiny_data: Path) -> None:
    place, _ = trained
    detect = pipeline("object-detection", model=str(place.folder / "out" / "model"), threshold=0.0)
    found = detect(str(tiny_data / "val" / "001.jpg"))
    assert {item["label"] for item in found} <= {"player", "ball"}


def test_a_second_run_in_the_same_folder_sets_the_first_aside(workplace, tiny_data: Path) -> None:
    for _ in range(2):
        finished = workplace.train(tiny_data, "training.max_steps=1", "logging.mlflow=false")
        assert finished.returncode == 0, finished.stderr
    assert "moved to" in finished.stdout
    (earlier,) = (workplace.folder / "out" / "earlier_runs").iterdir()
    assert (earlier / "results.json").exists()


def test_a_non_finite_loss_stops_all_processes_and_names_step_and_images(workplace, tiny_data: Path) -> None:
    finished = workplace.train(
        tiny_data,
        "training.learning_rate=1e30",
        "training.gradient_clip=0",
        "training.num_epochs=3",
        num_processes=2,
    )
    assert finished.returncode != 0
    for process in (0, 1):
        assert f"[process {process}] error: stopped at step" in finished.stderr
    assert "image ids [" in finished.stderr
    client = mlflow.MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("detr_training").experiment_id])
    assert run.info.status == "FAILED"
    assert "not finite" in run.data.tags["error"]


def test_an_image_that_breaks_during_training_is_replaced_and_reported(
    workplace, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / "train" / "005.jpg").write_bytes(b"not an image")
    (data / "val" / "002.jpg").write_bytes(b"not an image")
    finished = workplace.train(data, "logging.mlflow=false", "training.batch_size=8")
    assert finished.returncode == 0, finished.stderr
    assert "005.jpg" in finished.stdout
    assert "002.jpg" in finished.stdout


def test_a_last_step_with_non_finite_weights_saves_nothing(workplace, tiny_data: Path) -> None:
    finished = workplace.train(
        tiny_data, "training.max_steps=1", "training.learning_rate=1e30", "training.gradient_clip=0"
    )
    assert finished.returncode == 1
    assert "not finite" in finished.stderr
    assert not (workplace.folder / "out" / "checkpoints").exists()


def test_the_documented_file_store_works_and_prints_the_needed_variable(workplace, tiny_data: Path) -> None:
    finished = workplace.train(tiny_data, "training.max_steps=1", "logging.mlflow_tracking_uri=file:./mlruns")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("MLFLOW_ALLOW_FILE_STORE=true, set for this run") == 1
    assert list((workplace.folder / "mlruns").rglob("train_loss"))


def test_automatic_windows_are_resolved_reported_saved_and_kept_by_a_resume(
    workplace, tiny_data: Path
) -> None:
    overrides = ("data.tiles=auto", "data.shortest_edge=32", "training.num_epochs=2")
    dry = workplace.train(tiny_data, *overrides, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    printed = dry.stdout + dry.stderr
    assert "data.tiles auto: windows of " in printed
    assert re.search(r"by pixels a side after the resize to 32/96 of windows of (\d+)x\1:", printed)
    for max_steps in (2, 3):
        finished = workplace.train(
            tiny_data, *overrides, f"training.max_steps={max_steps}", "--resume", "auto"
        )
        assert finished.returncode == 0, finished.stderr
    assert "at step 2" in finished.stdout + finished.stderr
    config = load_config(workplace.folder / "out" / "config.yaml")
    tiles = config.data.tiles
    assert isinstance(tiles, Tiles)
    assert f"windows of {tiles.size}x{tiles.size} pixels" in printed
    run = mlflow.MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}").get_run(
        str(workplace.results()["run_id"])
    )
    assert json.loads(run.data.params["tiles"]) == tiles.model_dump()
    assert load_model(workplace.folder / "out" / "model").config.data.tiles == tiles
    changed = workplace.train(tiny_data, *overrides, "data.tiles.size=50", "--resume", "auto")
    assert changed.returncode == 2
    assert "data.tiles size=" in changed.stderr
