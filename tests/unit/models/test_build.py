"""Every family is built as one kind of module, with the settings of its paper."""

import pytest
import timm
import torch
from harness.data import RESNET_FAMILIES
from transformers import AutoModelForObjectDetection

from detr_dist.config import ModelConfig
from detr_dist.errors import UsageError
from detr_dist.models.build import build_detector
from detr_dist.models.detector import plain_network

CLASS_NAMES = ["player", "ball"]


@pytest.mark.parametrize("architecture", RESNET_FAMILIES)
def test_all_decoder_layers_predict_and_every_parameter_learns(
    tiny_detector, two_images, denoising_of, architecture: str
) -> None:
    detector = tiny_detector(architecture).train()
    outputs = detector(*two_images, denoising=denoising_of(detector))
    columns = len(CLASS_NAMES) + (detector.loss_settings.kind == "softmax")
    # The encoder's proposals and, in D-FINE and its successor, the first head.
    num_rows = 3 + {"rt_detr": 1, "rt_detr_v2": 1, "d_fine": 2, "deimv2": 2}.get(architecture, 0)
    assert outputs["pred_logits"].shape == (num_rows, 2, 6, columns)
    assert outputs["pred_boxes"].shape == (num_rows, 2, 6, 4)
    sum(each.square().sum() for each in outputs.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # DDP would wait for them


@pytest.mark.parametrize("architecture", RESNET_FAMILIES)
def test_the_transformers_network_predicts_the_same(tiny_detector, two_images, architecture: str) -> None:
    detector = tiny_detector(architecture)
    for _ in range(3):
        detector.train()(*two_images)  # moves the statistics of batch norm
    detector.eval()
    images, sizes_hw = two_images
    if not detector.family.uses_mask:
        sizes_hw[1] = sizes_hw[0]  # its boxes are fractions of the canvas
    plain = plain_network(detector)
    assert type(plain) is type(AutoModelForObjectDetection.from_config(detector.network.config))
    assert "_loss_function" not in vars(plain)
    pixels = (images - detector.mean) / detector.std
    mask = torch.zeros(2, 64, 96)
    for i, (height, width) in enumerate(sizes_hw.tolist()):
        mask[i, :height, :width] = 1
    with torch.no_grad():
        expected = plain(pixel_values=pixels * mask[:, None], pixel_mask=mask)
        outputs = detector(images, sizes_hw)
    # Another order of float32 sums: the library computes the last layer by itself.
    assert torch.allclose(outputs["pred_logits"][-1], expected.logits, atol=1e-5)
    assert torch.allclose(outputs["pred_boxes"][-1], expected.pred_boxes, atol=1e-5)


def test_the_content_of_the_padding_does_not_matter(tiny_detector, two_images) -> None:
    detector = tiny_detector("detr").eval()
    images, sizes_hw = two_images
    outputs = detector(images, sizes_hw)
    images[1, :, 50:] = 7
    images[1, :, :, 70:] = 200
    assert torch.equal(outputs["pred_boxes"], detector(images, sizes_hw)["pred_boxes"])


@pytest.mark.parametrize(("freeze", "trainable"), [("auto", True), (True, False), (False, True)])
def test_batch_norm_from_scratch_learns_unless_frozen(tiny_detector, freeze: object, trainable: bool) -> None:
    detector = tiny_detector("detr", freeze_batch_norm=freeze)
    norms = [m for m in detector.network.model.backbone.modules() if "BatchNorm2d" in type(m).__name__]
    assert norms
    assert all(isinstance(norm, torch.nn.BatchNorm2d) == trainable for norm in norms)


def test_the_loss_weights_equal_those_of_the_papers(tiny_detector) -> None:
    weights = {name: tiny_detector(name).loss_settings for name in RESNET_FAMILIES}
    boxes = {"bbox": 5, "giou": 2}
    assert {name: (w.kind, w.cost_class, w.weights) for name, w in weights.items()} == {
        "detr": ("softmax", 1, {"ce": 1, **boxes}),
        "conditional_detr": ("sigmoid", 2, {"ce": 2, **boxes}),
        "deformable_detr": ("sigmoid", 2, {"ce": 2, **boxes}),
        "dab_detr": ("sigmoid", 2, {"ce": 1, **boxes}),
        "rt_detr": ("sigmoid", 2, {"vfl": 1, **boxes}),
        "rt_detr_v2": ("sigmoid", 2, {"vfl": 1, **boxes}),
        "d_fine": ("sigmoid", 2, {"vfl": 1, "fgl": 0.15, "ddf": 1.5, **boxes}),
        "deimv2": ("sigmoid", 2, {"mal": 1, "fgl": 0.15, "ddf": 1.5, **boxes}),
    }
    assert {(w.cost_bbox, w.cost_giou) for w in weights.values()} == {(5, 2)}
    assert weights["rt_detr_v2"].vfl_alpha == 0.75


def test_fine_tuning_a_detector_replaces_the_head_and_freezes_norms(tiny_detector, tmp_path) -> None:
    trained = tiny_detector("conditional_detr")
    plain_network(trained).save_pretrained(tmp_path / "trained")
    config = ModelConfig(model_architecture="conditional_detr", pretrained=str(tmp_path / "trained"))
    tuned = build_detector(config, ["a", "b", "c", "d"])
    assert tuned.class_names == ("a", "b", "c", "d")
    assert tuned.network.class_labels_classifier.out_features == 4
    before, after = trained.network.state_dict(), tuned.network.state_dict()
    kept = [key for key in after if torch.equal(before[key], after[key])]
    assert len(kept) > 0.9 * len(after)
    frozen = {name for name, p in tuned.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("embedder" in name or "stages.0." in name for name in frozen)


def test_a_pretrained_detector_of_another_architecture_is_refused(tiny_detector, tmp_path) -> None:
    plain_network(tiny_detector("detr")).save_pretrained(tmp_path / "trained")
    with pytest.raises(UsageError, match=r"model\.model_architecture"):
        build_detector(
            ModelConfig(model_architecture="dab_detr", pretrained=str(tmp_path / "trained")), CLASS_NAMES
        )
    with pytest.raises(UsageError, match="num_queries 6"):
        build_detector(ModelConfig(pretrained=str(tmp_path / "trained"), num_queries=50), CLASS_NAMES)


def test_unavailable_weights_are_an_error_that_names_the_setting(monkeypatch) -> None:
    create_model = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("no network")
        return create_model(name, **options)

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(UsageError, match=r"no network.*model\.pretrained_backbone=false"):
        build_detector(ModelConfig(hidden_dim=32, num_encoder_layers=1, num_decoder_layers=1), CLASS_NAMES)


@pytest.mark.parametrize("architecture", ["conditional_detr", "deformable_detr", "dab_detr", "rt_detr_v2"])
def test_sigmoid_heads_start_at_one_over_num_classes_plus_one(
    tiny_detector, two_images, architecture: str
) -> None:
    logits = tiny_detector(architecture)(*two_images)["pred_logits"]
    assert 0.25 < float(logits.detach().sigmoid().mean()) < 0.42  # 1/3 and random weights


def test_fine_tuning_keeps_the_head_for_the_same_classes_or_replaces_it(tiny_detector, tmp_path) -> None:
    trained = tiny_detector("detr")
    torch.nn.init.constant_(trained.network.class_labels_classifier.weight, 7.0)
    plain_network(trained).save_pretrained(tmp_path / "trained")
    config = ModelConfig(pretrained=str(tmp_path / "trained"))
    same = build_detector(config, CLASS_NAMES).network.class_labels_classifier.weight
    other = build_detector(config, ["cat", "dog"]).network.class_labels_classifier.weight
    assert (same == 7).all()
    assert (other.abs() < 1).all()


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"nonsense": 1}, "encoder_ffn_dim"),
        ({"d_model": 64}, r"model\.hidden_dim"),
        ({"decoder_layers": 4}, r"model\.num_decoder_layers"),
        ({"encoder_attention_heads": 5}, "cannot"),
        ({"encoder_ffn_dim": 77}, "no weights that fit"),
    ],
)
def test_an_invalid_override_is_refused_for_a_pretrained_model_too(
    tiny_detector, overrides, hint, tmp_path
) -> None:
    plain_network(tiny_detector("detr")).save_pretrained(tmp_path / "trained")
    with pytest.raises(UsageError, match=hint):
        build_detector(
            ModelConfig(pretrained=str(tmp_path / "trained"), config_overrides=overrides), CLASS_NAMES
        )


def test_a_damaged_pretrained_folder_fails_with_one_line(tiny_detector, tmp_path) -> None:
    plain_network(tiny_detector("detr")).save_pretrained(tmp_path / "trained")
    weights = tmp_path / "trained" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"pretrained model .* cannot be loaded"):
        build_detector(ModelConfig(pretrained=str(tmp_path / "trained")), CLASS_NAMES)


def test_only_the_stem_of_a_pretrained_resnet_stays_fixed(monkeypatch) -> None:
    create_model = timm.create_model
    monkeypatch.setattr(
        "timm.create_model", lambda name, pretrained=False, **rest: create_model(name, **rest)
    )
    for backbone, some in (("resnet18", {"conv1", "layer1"}), ("regnety_002", set())):
        config = ModelConfig(backbone=backbone, hidden_dim=32, num_encoder_layers=1, num_decoder_layers=1)
        detector = build_detector(config, CLASS_NAMES)
        body = detector.network.model.backbone.model
        assert {n.split(".")[0] for n, p in body.named_parameters() if not p.requires_grad} == some
