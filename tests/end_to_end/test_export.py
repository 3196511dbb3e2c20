"""A trained model is exported from every model reference and loads in every supported way."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

IMAGE = Image.new("RGB", (96, 80), "green")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, tiny_data: Path):
    """Train two epochs with averaged weights; tests only read the run and add folders next to it."""
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    settings = ("training.max_steps=4", "training.ema_decay=0.9", "evaluation.every_epochs=1")
    finished = place.train(tiny_data, *settings)
    assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture
def run_id(trained) -> str:
    return str(trained.results()["run_id"])


@pytest.fixture
def at_home(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use MLflow's own functions, as a user calls them in the folder of the run."""
    import mlflow

    monkeypatch.chdir(trained.folder)
    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    yield
    mlflow.set_tracking_uri(None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def metadata(folder: Path) -> dict:
    return yaml.safe_load((folder / "MLmodel").read_text())["metadata"]


def two_images() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 160, 128, dtype=torch.int64)
    mask[1, 100:] = 0
    pixels = torch.randn(2, 3, 160, 128, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "pixel_mask": mask}


def predict(network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        outputs = network(**two_images())
    return outputs.logits, outputs.pred_boxes


def error_of(finished: subprocess.CompletedProcess[str]) -> str:
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    return line


@pytest.mark.slow
def test_a_model_of_a_run_is_exported_registered_and_loads_everywhere(trained, run_id, at_home) -> None:
    import mlflow
    from transformers import AutoModelForObjectDetection, pipeline

    finished = trained.run(
        *("export", "--model", f"runs:/{run_id}/model", "--output-dir", "production/best"),
        *("--onnx", "--register-as", "detector", "--alias", "production"),
    )
    assert finished.returncode == 0, finished.stderr
    assert "largest difference to torch " in finished.stdout
    assert "detector version 1, alias production: models:/detector/1" in finished.stdout
    assert finished.stderr == ""

    folder = trained.folder / "production" / "best"
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    source = trained.folder / "out" / "model"
    assert same(weights(folder), weights(source))
    for name in ("preprocessor_config.json", "requirements.txt"):
        assert (folder / name).read_text() == (source / name).read_text()
    assert metadata(folder) == metadata(source) | {"source": f"runs:/{run_id}/model", "run_id": run_id}

    network = AutoModelForObjectDetection.from_pretrained(folder, use_safetensors=True)
    expected = predict(network)
    for uri in (str(folder), "models:/detector/1", "models:/detector@production"):
        assert mlflow.models.get_model_info(uri).flavors.keys() == {"python_function", "pytorch"}
        logits, boxes = predict(mlflow.pytorch.load_model(uri))
        assert logits.equal(expected[0])
        assert boxes.equal(expected[1])
    version = mlflow.MlflowClient().get_model_version("detector", "1")
    assert version.run_id == run_id

    found = onnxruntime.InferenceSession(folder / "model.onnx").run(
        ["logits", "pred_boxes"], {name: value.numpy() for name, value in two_images().items()}
    )
    for got, wanted in zip(found, expected, strict=True):
        # Another order of float32 sums, in values of about 1.
        assert torch.allclose(torch.from_numpy(got), wanted, atol=1e-5)

    detections = pipeline("object-detection", model=str(folder))(IMAGE, threshold=0.0)
    assert {each["label"] for each in detections} <= {"player", "ball"}
    assert detections

    again = trained.run(
        *("export", "--model", "models:/detector/@production", "--output-dir", "production/again")
    )
    assert again.returncode == 0, again.stderr
    assert same(weights(trained.folder / "production" / "again"), weights(folder))
    assert metadata(trained.folder / "production" / "again")["run_id"] == run_id


@pytest.mark.parametrize("tracking_uri", ["sqlite:///mlflow.db", "file:./store"])
def test_a_checkpoint_is_exported_with_averaged_weights_and_registered(
    tracking_uri: str, trained, run_id, at_home, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    output = Path("from_checkpoint") / tracking_uri.partition(":")[0]
    checkpoint = trained.folder / "out" / "checkpoints" / "best"
    finished = trained.run(
        *("export", "--model", "out/checkpoints/best", "--output-dir", output),
        *("--register-as", "from_checkpoint", "--tracking-uri", tracking_uri),
    )
    assert finished.returncode == 0, finished.stderr
    folder = trained.folder / output
    found, averaged = weights(folder), load_file(checkpoint / "ema.safetensors")
    assert all(tensor.equal(averaged[key]) for key, tensor in found.items())
    sizes = yaml.safe_load((folder / "preprocessor_config.json").read_text())["size"]
    assert sizes == {"shortest_edge": 64, "longest_edge": 96}
    best = metadata(trained.folder / "out" / "model")
    assert metadata(folder) == best | {"source": "out/checkpoints/best", "run_id": run_id}

    shutil.rmtree(folder)  # the registry has its own files
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tracking_uri)
    predict(mlflow.pytorch.load_model("models:/from_checkpoint/1"))


@pytest.mark.slow
def test_an_export_loads_without_this_package(trained, tmp_path: Path) -> None:
    finished = trained.run("export", "--model", "out/model", "--output-dir", tmp_path / "export")
    assert finished.returncode == 0, finished.stderr
    script = """
import sys
sys.modules["detr_dist"] = None  # importing it fails
import mlflow.pytorch, torch
network = mlflow.pytorch.load_model(sys.argv[1])
outputs = network(pixel_values=torch.zeros(1, 3, 64, 96), pixel_mask=torch.ones(1, 64, 96))
print(type(network).__module__, tuple(outputs.pred_boxes.shape))
"""
    loaded = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "export"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split(maxsplit=1) == ["transformers.models.detr.modeling_detr", "(1, 8, 4)\n"]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("out/modle", "out/modle: no such folder"),
        ("out", "out: neither a model nor a checkpoint"),
        (f"runs:/{'0' * 32}/model", "cannot be fetched from MLflow at sqlite:///mlflow.db"),
        ("models:/nobody/1", "cannot be fetched from MLflow at sqlite:///mlflow.db"),
        ("pickle_only", "pickle_only: cannot be loaded"),
        ("no_processor", "no_processor: its preprocessor_config.json"),
        ("half", "half: lacks "),
    ],
)
def test_an_unavailable_model_fails_with_one_line_and_leaves_no_files(trained, model: str, part: str) -> None:
    broken = trained.folder / model
    if "/" not in model and not broken.exists():
        shutil.copytree(trained.folder / "out" / "model", broken)
        {"pickle_only": lose_safetensors, "no_processor": lose_processor, "half": lose_weights}[model](broken)
    before = sorted(trained.folder.iterdir())
    finished = trained.run("export", "--model", model, "--output-dir", "never")
    assert part in error_of(finished)
    assert ("correct it, or --tracking-uri" in finished.stderr) == (":/" in model)
    assert sorted(trained.folder.iterdir()) == before


def lose_safetensors(folder: Path) -> None:
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lose_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def lose_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    kept = {key: tensor for key, tensor in weights(folder).items() if "bbox_predictor" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--output-dir", "out"), "--output-dir out: already exists"),
        (("--output-dir", "never", "--alias", "production"), "give --register-as"),
        (("--output-dir", "never", "--register-as", "a/b"), "has no / or :"),
        (
            ("--output-dir", "never", "--register-as", "a", "--tracking-uri", "sqlite:////no/such/x.db"),
            "sqlite:////no/such/x.db: no folder /no/such that can be written to; correct --tracking-uri",
        ),
    ],
)
def test_invalid_options_fail_with_one_line_before_anything_is_written(trained, options, part: str) -> None:
    before = sorted(trained.folder.iterdir())
    assert part in error_of(trained.run("export", "--model", "out/model", *options))
    assert sorted(trained.folder.iterdir()) == before


def test_a_wrong_path_in_init_from_is_reported_before_training(trained, tiny_data: Path) -> None:
    finished = trained.train(tiny_data, "--init-from", "out/modle", output="never")
    assert "out/modle: no such folder" in error_of(finished)


def test_a_failed_onnx_comparison_leaves_no_files(
    trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detr_dist.errors import DetrDistError
    from detr_dist.inference.export import export

    monkeypatch.setattr("detr_dist.inference.onnx.TOLERANCES", {"logits": 0.0, "pred_boxes": -1.0})
    with pytest.raises(DetrDistError, match="differ from torch's"):
        export(trained.folder / "out/model", tmp_path / "never", tracking_uri="sqlite://", onnx=True)
    assert list(tmp_path.iterdir()) == []
