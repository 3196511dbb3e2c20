"""One user file adds a family, a loss term and a backbone, and every command works with them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.commands import Workplace
from mlflow import MlflowClient

from detr_dist.errors import UsageError
from detr_dist.extensions import FAMILIES, LOSSES, import_extensions
from detr_dist.models.build import load_network, trained_detector
from detr_dist.training.checkpoint import open_checkpoint

OWN = """
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models._builder import build_model_with_cfg

import detr_dist as dd
from detr_dist.models.families import Family, detr


@register_model
def small_pitch_net(pretrained=False, **options):
    widths = {"stem_width": 8, "channels": (8, 8, 16, 16)}
    return build_model_with_cfg(
        ResNet, "small_pitch_net", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), **widths, **options
    )


@dd.register_loss("center")
def center_distance(matched):
    difference = matched.boxes_cxcywh[..., :2] - matched.target_boxes_cxcywh[..., :2]
    return difference.abs().flatten(1).sum(1) / matched.counts.num_boxes_or_one


dd.register_family(
    Family(
        name="table_detr",
        model_type="table-transformer",
        loss_kind="softmax",
        weights={"ce": 1.0},
        class_heads=("class_labels_classifier",),
        masks_attention=False,
        prepare=detr.return_every_layer,
    )
)
"""
SETTINGS = (
    "training.extensions=[own_models.py]",
    "model.model_architecture=table_detr",
    "model.backbone=small_pitch_net",
    "loss.weights={center: 0.5}",
    "model.dropout=0",
    "training.gradient_clip=0",
)


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    (workplace.folder / "own_models.py").write_text(OWN)
    return workplace


@pytest.fixture
def registries_are_restored() -> Iterator[None]:
    kept = [(registry, dict(vars(registry)["_objects"])) for registry in (FAMILIES, LOSSES)]
    yield
    for registry, objects in kept:
        vars(registry)["_objects"] = objects
    sys.modules.pop("own_models", None)


@pytest.mark.usefixtures("registries_are_restored")
def test_custom_models_train_evaluate_resume_load_and_predict(place: Workplace, easy_data: Path) -> None:
    finished = place.train(easy_data, *SETTINGS, "training.max_steps=2")
    assert finished.returncode == 0, finished.stderr
    finished = place.run(
        *place._training(easy_data, "out"), "--resume", "auto", *SETTINGS, "training.max_steps=3"
    )
    assert finished.returncode == 0, finished.stderr
    steps, losses = zip(*place.history("train_loss_center"), strict=True)
    assert steps == (1, 2, 3)
    assert losses[-1] > 0  # a step of images without boxes has none
    assert place.history("val_loss_center")[-1][1] > 0
    run = MlflowClient(f"sqlite:///{place.folder / 'mlflow.db'}").get_run(str(place.results()["run_id"]))
    assert run.data.params["hidden_dim"] == "32"
    assert (
        json.loads((place.folder / "out/model/config.json").read_text())["model_type"] == "table-transformer"
    )

    refused = place.run(
        "predict", "--model", "out/model", "--input", easy_data / "val", "--output-dir", "found"
    )
    assert refused.returncode == 2
    assert "'table_detr', which is not registered" in refused.stderr.splitlines()[-1]
    with pytest.raises(UsageError, match="'table_detr', which is not registered; first import the module"):
        load_network("it", str(place.folder / "out/model"))

    import_extensions([str(place.folder / "own_models.py")])
    last = open_checkpoint(place.folder / "out/checkpoints/last")
    for folder in (place.folder / "out/model", last.folder):
        network = load_network("it", str(folder))
        detector = trained_detector(network, last.facts.config.model, channels_last=False)
        assert detector.family.name == "table_detr"
        found = detector(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]]))
        assert found["pred_boxes"].isfinite().all()


def test_two_processes_learn_the_same_as_one(place: Workplace, easy_data: Path) -> None:
    for output, num_processes, batch_size in (("one", 1, 8), ("two", 2, 4)):
        finished = place.train(
            easy_data,
            *SETTINGS,
            "training.max_steps=2",
            f"training.batch_size={batch_size}",
            output=output,
            num_processes=num_processes,
        )
        assert finished.returncode == 0, finished.stderr
    one, two = (place.history("train_loss_center", output)[-1][1] for output in ("one", "two"))
    assert one > 0
    assert one == pytest.approx(two, rel=1e-4)  # float32 sums in another order, after one step
