"""docs/mlflow.md, as a user follows it, with each kind of store."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import yaml
from harness.commands import clean_environment
from mlflow import MlflowClient

from detr_dist.config import load_config

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs" / "mlflow.md").read_text()

# The required names, which both the run and the guide must have.
PARAMS = {
    "batch_size", "learning_rate", "num_epochs", "weight_decay", "gradient_clip", "mixed_precision",
    "gradient_accumulation_steps", "compile_model", "channels_last", "model_architecture", "backbone",
    "num_classes", "hidden_dim", "num_encoder_layers", "num_decoder_layers", "train_samples", "val_samples",
    "num_workers", "prefetch_factor",
}  # fmt: skip
METRICS = {
    "train_loss", "train_loss_ce", "train_loss_bbox", "train_loss_giou", "learning_rate", "memory_ram_gb",
    "val_map", "val_precision", "val_recall", "val_f1",
    "val_player_map", "val_player_precision", "val_player_recall", "val_player_f1",
    "val_ball_map", "val_ball_precision", "val_ball_recall", "val_ball_f1",
}  # fmt: skip
ON_GPUS = {"memory_gpu_gb", "memory_gpu_reserved_gb"}
ARTIFACTS = {
    "checkpoints/best", "checkpoints/epoch_10", "model", *(f"models/epoch_{epoch}" for epoch in range(1, 11)),
    "pictures/epoch_10", "logs/train.log",
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def names_in_table(title: str) -> set[str]:
    """Return the names in the first two columns of the table below a title."""
    rows = re.search(rf"### {title}\n\n(.*?)\n\n", GUIDE, flags=re.DOTALL)
    assert rows is not None
    cells = [row.split("|")[1:3] for row in rows[1].splitlines()[2:]]
    return set(re.findall(r"`([\w/<>]+)`", " ".join(cell for row in cells for cell in row)))


@dataclass
class Followed:
    """Folder like a user's clone, in which the run of the guide was done."""

    place: object
    uri: str
    run_id: str

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def run(self, command: list[str]) -> None:
        """Run a `detr-dist` command exactly as in the guide."""
        arguments = command[2:] if command[0] == "python" else command[1:]
        arguments = [argument.replace("RUN_ID", self.run_id) for argument in arguments]
        finished = self.place.run(*arguments, environment={"MLFLOW_TRACKING_URI": self.uri})
        assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module", params=["sqlite", "file", "http"])
def followed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_workplace, tiny_data: Path
) -> Iterator[Followed]:
    place = new_workplace(tmp_path_factory.mktemp(request.param))
    uri = {"sqlite": "sqlite:///mlflow.db", "file": "file:./mlruns"}.get(request.param)
    if uri is None:
        server = request.getfixturevalue("mlflow_server")
        server.start()
        uri = server.uri
    settings = yaml.safe_load(place.config.read_text())
    settings["training"] |= {"num_epochs": 10, "batch_size": 4, "max_steps": None}
    settings["evaluation"] = {"pictures": True}
    settings["logging"] |= {"mlflow_tracking_uri": uri, "log_every_steps": 10, "tensorboard": True}
    for folder in ("configs", "datasets"):
        (place.folder / folder).mkdir()
    (place.folder / "configs" / "training.yaml").write_text(yaml.safe_dump(settings))
    shutil.copytree(tiny_data / "train", place.folder / "datasets" / "train")
    shutil.copytree(tiny_data / "val", place.folder / "datasets" / "val")
    shutil.copytree(tiny_data / "val", place.folder / "datasets" / "test")
    absolute = {"sqlite": f"sqlite:///{place.folder}/mlflow.db", "file": f"file://{place.folder}/mlruns"}
    followed = Followed(place, absolute.get(request.param, uri), "")
    train, *_ = commands()
    assert train[:3] == ["python", "scripts/train_detr.py", "--config"]
    followed.run([*train[:2], "train", *train[2:]])
    followed.run_id = place.results("models/first")["run_id"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.folder)
        if request.param == "file":
            patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield followed
        mlflow.set_tracking_uri(None)


def test_the_logged_params_are_the_required_and_documented_ones(followed: Followed) -> None:
    logged = set(followed.client.get_run(followed.run_id).data.params)
    named = names_in_table("Parameters")
    assert logged >= PARAMS
    assert named >= PARAMS
    assert named - logged == {  # unset here
        "max_steps", "pretrained", "checkpoint_every_steps", "checkpoint_keep_last",
        "logging_mlflow_run_name", "logging_register_model_as", "extensions", "callbacks", "logging_trackers",
        "multi_scale", "tiles", "class_loss", "repeat_rare", "copy_paste", "train_sources",
        "evaluation_size_bands",
    }  # fmt: skip
    assert logged <= named


def test_the_logged_metrics_are_the_required_and_documented_ones(followed: Followed) -> None:
    logged = set(followed.client.get_run(followed.run_id).data.metrics)
    named = names_in_table("Metrics")
    assert logged >= METRICS
    for_classes = {name.replace("<class>", label) for name in named for label in ("player", "ball")}
    assert for_classes >= METRICS | ON_GPUS
    patterns = [re.sub("<.*?>", r"[\\w.-]+", name) for name in named]
    assert [name for name in logged if not any(re.fullmatch(each, name) for each in patterns)] == []
    absent = {name for name in for_classes if "<" not in name} - logged
    # Nothing is compiled, no box is that large, and a class without detections, or with poor ones, has no
    # thresholds and no calibration.
    of_classes = {"calibration_error", "threshold", "threshold_p95"}
    may_lack = {f"val_{label}_{name}" for label in ("player", "ball") for name in of_classes}
    may_lack |= {"compiled_graphs", "val_map_medium", "val_map_large", "val_calibration_error"}
    assert absent - ON_GPUS <= may_lack


def test_the_logged_artifacts_are_the_required_and_documented_ones(followed: Followed) -> None:
    def children(path: str | None = None) -> set[str]:
        return {item.path for item in followed.client.list_artifacts(followed.run_id, path)}

    folders = {"checkpoints", "logs", "models", "pictures"}
    found = (children() - folders).union(*map(children, folders))
    assert found >= ARTIFACTS
    named = {re.sub("<N>", r"\\d+", name) for name in re.findall(r"`([\w/.<>]+)`", artifact_names())}
    assert [name for name in found if not any(re.fullmatch(each, name) for each in named)] == []
    assert all(any(re.fullmatch(each, name) for name in found) for each in named)


def artifact_names() -> str:
    rows = re.search(r"### Artifacts.*?\n\n(.*?)\n\n", GUIDE, flags=re.DOTALL)
    assert rows is not None
    return " ".join(row.split("|")[1] for row in rows[1].splitlines()[2:])


@pytest.mark.slow
def test_every_command_and_snippet_runs(followed: Followed) -> None:
    _, *others = commands()
    for command in [command for command in others if command[0] == "detr-dist"]:
        if command[1] == "prune":  # deletes what the snippets load
            continue
        followed.run(command)
    snippets = "\n".join(blocks("python"))
    if followed.uri.startswith("sqlite"):  # where MLflow looks by itself: nothing is set
        finished = subprocess.run(
            [sys.executable, "-c", snippets],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=clean_environment(),
        )
        assert finished.returncode == 0, finished.stderr
        assert followed.run_id in finished.stdout
    else:
        mlflow.set_tracking_uri(followed.uri)
        exec(compile(snippets, "docs/mlflow.md", "exec"), {})
    assert followed.client.get_run(followed.run_id).data.tags["baseline"] == "true"
    for command in others:
        if command[:2] == ["detr-dist", "prune"]:
            followed.run(command)
    left = {item.path for item in followed.client.list_artifacts(followed.run_id, "models")}
    assert left == {"models/epoch_9", "models/epoch_10"}


def test_every_command_in_the_guide_is_tested() -> None:
    """Leave out the pages, which test_ui.py opens, and the server of models, which test_serving.py asks."""
    others = [command for command in commands() if command[0] not in ("python", "detr-dist")]
    started = [command[:3] for command in others if command[0] not in ("echo", "curl")]
    assert started == [["bash", "scripts/start_mlflow_ui.sh"], ["mlflow", "models", "serve"]]


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_settings_in_the_guide_are_valid(block: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(block)
    assert load_config(tmp_path / "settings.yaml").logging.mlflow_experiment_name == "detr_training"
