"""A family, a loss term and a backbone of the user work like those of the package."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import AutoConfig

import detr_dist
from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.extensions import FAMILIES
from detr_dist.models.build import load_network, trained_detector
from detr_dist.models.detector import plain_network
from detr_dist.models.families import Family, detr, finest_stride_of, num_queries_of

TABLE = Family(
    name="table",
    model_type="table-transformer",
    loss_kind="softmax",
    weights={"ce": 3.0, "giou": 4.0},
    class_heads=("class_labels_classifier",),
    config_defaults={"class_cost": 2},
    masks_attention=False,
    prepare=detr.return_every_layer,
)


@pytest.fixture(autouse=True)
def registered_again() -> Iterator[None]:
    """Restore the families after the test."""
    objects, origins = dict(FAMILIES._objects), dict(FAMILIES._origins)
    yield
    FAMILIES._objects, FAMILIES._origins = objects, origins


def forget(name: str) -> None:
    """Unregister a family, as in a process that has not imported its module."""
    del FAMILIES._objects[name]


def test_a_custom_family_learns_and_predicts_the_same_when_reloaded(
    tiny_detector, two_images, tmp_path: Path
) -> None:
    detr_dist.register_family(TABLE)
    detector = tiny_detector("table").train()
    outputs = detector(*two_images)
    assert outputs["pred_logits"].shape == (3, 2, 6, 3)
    torch.stack([output.square().sum() for output in outputs.values()]).sum().backward()
    assert [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    plain_network(detector).save_pretrained(tmp_path)
    loaded = trained_detector(load_network("it", str(tmp_path)), ModelConfig(), channels_last=False)
    assert loaded.family == TABLE
    assert loaded.loss_settings == detector.loss_settings
    assert loaded.loss_settings.weights == {"ce": 3.0, "giou": 4.0, "bbox": 5.0}
    assert loaded.loss_settings.cost_class == 2
    expected, found = (each.eval()(*two_images)["pred_boxes"] for each in (detector, loaded))
    # Frozen batch norm rounds otherwise than the one that has learned.
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_variant_with_the_same_network_keeps_its_own_recipe(tiny_detector, tmp_path: Path) -> None:
    detr_dist.register_family(dataclasses.replace(detr.FAMILY, name="heavy", weights={"ce": 7.0}))
    for name, weight in (("heavy", 7.0), ("detr", 1.0)):
        plain_network(tiny_detector(name)).save_pretrained(tmp_path / name)
        network = load_network("it", str(tmp_path / name))
        detector = trained_detector(network, ModelConfig(), channels_last=False)
        assert (detector.family.name, detector.loss_settings.weights["ce"]) == (name, weight)
    assert "family" not in json.dumps(json.loads((tmp_path / "detr" / "config.json").read_text()))
    forget("heavy")
    with pytest.raises(
        UsageError, match=r"^it: is of the family 'heavy', which is not registered; first import"
    ):
        load_network("it", str(tmp_path / "heavy"))


def test_a_family_defines_how_predictions_become_detections(tiny_detector, two_images) -> None:
    def last_layer_twice(*, logits: torch.Tensor, pred_boxes: torch.Tensor, **_: object) -> dict:
        return {"pred_logits": torch.stack((logits, logits)), "pred_boxes": torch.stack(2 * (pred_boxes,))}

    detr_dist.register_family(dataclasses.replace(detr.FAMILY, name="twice", rows=last_layer_twice))
    detector = tiny_detector("twice").eval()
    assert detector(*two_images)["pred_boxes"].shape == (2, 2, 6, 4)


def test_options_that_a_family_lacks_are_refused_by_key(tiny_detector) -> None:
    options = {
        key: option for key, option in detr.FAMILY.shape_options.items() if key != "num_encoder_layers"
    }
    detr_dist.register_family(dataclasses.replace(detr.FAMILY, name="short", shape_options=options))
    with pytest.raises(UsageError, match=r"model\.num_encoder_layers: short has no such option"):
        tiny_detector("short")


def test_a_name_belongs_to_the_module_that_registered_it_first() -> None:
    detr_dist.register_family(TABLE)
    changed = dataclasses.replace(TABLE, weights={"ce": 1.0})
    detr_dist.register_family(changed)  # a cell of a notebook, executed again
    assert FAMILIES.find("table", "key") is changed
    module = {"__name__": "elsewhere", "family": TABLE, "register_family": detr_dist.register_family}
    with pytest.raises(UsageError, match="family 'table' exists already"):
        exec("register_family(family)", module)
    with pytest.raises(UsageError, match="family 'detr' exists already"):
        detr_dist.register_family(dataclasses.replace(TABLE, name="detr"))


def test_a_pretrained_network_of_another_family_has_no_known_stride(tmp_path: Path) -> None:
    """Building the network reports the family."""
    AutoConfig.for_model("detr").save_pretrained(tmp_path)
    config = ModelConfig(model_architecture="rf_detr", pretrained=str(tmp_path), num_queries=7)
    assert finest_stride_of(config) is None
    assert num_queries_of(config) == 7


def test_an_option_of_another_family_leaves_the_number_of_queries_known() -> None:
    """Building the network reports the option."""
    config = ModelConfig(num_queries=7, config_overrides={"two_stage": True})
    assert num_queries_of(config) == 7


@pytest.mark.parametrize(
    ("settings", "stride"),
    [
        ({"model_architecture": "detr"}, 32),
        ({"model_architecture": "conditional_detr", "config_overrides": {"dilation": True}}, 16),
        ({"model_architecture": "dab_detr"}, 32),
        ({"model_architecture": "deformable_detr"}, 8),
        ({"model_architecture": "deformable_detr", "config_overrides": {"num_feature_levels": 1}}, 32),
        (
            {
                "model_architecture": "deformable_detr",
                "backbone": {"model_type": "resnet", "out_features": ["stage3", "stage4"]},
            },
            16,
        ),
        ({"model_architecture": "rt_detr"}, 8),
        ({"model_architecture": "rt_detr_v2", "config_overrides": {"feat_strides": [16, 32]}}, 16),
        ({"model_architecture": "d_fine"}, 8),
        ({"model_architecture": "deimv2"}, 8),
        ({"model_architecture": "lw_detr"}, 16),
        ({"model_architecture": "lw_detr", "config_overrides": {"projector_scale_factors": [0.5, 2.0]}}, 8),
        ({"model_architecture": "rf_detr"}, 14),
        ({"model_architecture": "yours"}, None),
        ({"pretrained": "no/such/folder"}, None),
        ({"config_overrides": {"no_such_option": [1]}, "backbone": {"model_type": "none"}}, None),
    ],
)
def test_the_finest_stride_is_known_without_building_the_network(
    settings: dict[str, Any], stride: int | None
) -> None:
    assert finest_stride_of(ModelConfig(**settings)) == stride


def test_an_unregistered_family_fails_with_one_line(tiny_detector) -> None:
    with pytest.raises(UsageError, match=r"no family 'yours'; known are detr, .*training\.extensions"):
        tiny_detector("yours")
    assert num_queries_of(ModelConfig(model_architecture="yours")) is None
    with pytest.raises(UsageError, match=r"no family 'mine\.py:MINE'"):
        tiny_detector("mine.py:MINE")  # its models could not be loaded again by name


def test_a_backbone_registered_with_timm_is_built_saved_and_loaded(
    tiny_detector, two_images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pitch_net(pretrained: bool = False, **options: object) -> torch.nn.Module:
        return timm.create_model("test_resnet", pretrained=pretrained, **options)

    entry_points = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entry_points, "pitch_net", pitch_net)
    detector = tiny_detector("detr", backbone="pitch_net")
    plain_network(detector).save_pretrained(tmp_path)
    loaded = trained_detector(load_network("it", str(tmp_path)), ModelConfig(), channels_last=False)
    expected, found = (each.eval()(*two_images)["pred_boxes"] for each in (detector, loaded))
    assert torch.allclose(found, expected, atol=1e-6)
    del entry_points["pitch_net"]
    with pytest.raises(
        UsageError, match=r"^it: its backbone 'pitch_net' is not registered with timm; one of"
    ):
        load_network("it", str(tmp_path))
    with pytest.raises(UsageError, match=r"'pitch_net' is not registered with timm.*training\.extensions"):
        tiny_detector("detr", backbone="pitch_net")
