"""Every setting is among the params of a run, under its documented name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detr_dist.config import Config, LoggingConfig
from detr_dist.data.concatenation import Concatenation
from detr_dist.tracking.params import config_params, run_name

OPTIONAL = {
    ("model", "backbone"): "resnet18",
    ("model", "pretrained"): "facebook/detr-resnet-50",
    ("model", "num_classes"): 2,
    ("model", "hidden_dim"): 64,
    ("model", "num_encoder_layers"): 1,
    ("model", "num_decoder_layers"): 2,
    ("model", "num_queries"): 9,
    ("model", "dropout"): 0.1,
    ("model", "class_loss"): "vfl",
    ("training", "max_steps"): 7,
    ("data", "multi_scale"): [480, 512],
    ("data", "tiles"): {"size": 640},
    ("data", "repeat_rare"): 0.01,
    ("data", "copy_paste"): {"classes": ["ball"], "most": 2},
    ("evaluation", "size_bands"): [8, 16],
    ("training", "extensions"): ["ours.py", "football.losses"],
    ("training", "callbacks"): ["ours.py:Alarm"],
    ("checkpoint", "every_steps"): 5,
    ("checkpoint", "keep_last"): 3,
    ("logging", "mlflow_run_name"): "baseline",
    ("logging", "trackers"): ["ours.py:Sheet"],
    ("logging", "register_model_as"): "players",
}
"""What is unset by default. A setting that joins them must be added here."""


def test_every_configuration_key_is_its_own_param() -> None:
    sections = Config().model_dump()
    for (section, key), value in OPTIONAL.items():
        assert sections[section][key] in (None, [])
        sections[section][key] = value
    params = config_params(Config.model_validate(sections))
    keys = [(section, key) for section, settings in sections.items() for key in settings]
    assert len(params) == len(keys)
    for section, key in keys:
        name = key if section in ("data", "model", "training") else f"{section}_{key}"
        assert params[name] is not None, name
    assert params["extensions"] == "ours.py, football.losses"


def test_unset_values_and_empty_lists_are_none() -> None:
    params = config_params(Config())
    for section, key in OPTIONAL:
        assert params[key if section in ("data", "model", "training") else f"{section}_{key}"] is None
    assert params["augmentation"] == "detr"


def test_mappings_are_logged_as_one_text_without_credentials() -> None:
    config = Config(
        model={"config_overrides": {"encoder_ffn_dim": 32, "hf_token": "s3cret"}},
        logging=LoggingConfig(mlflow_tracking_uri="http://bob:s3cret@host:5000"),
    )
    params = config_params(config)
    assert params["config_overrides"] == '{"encoder_ffn_dim": 32, "hf_token": "***"}'
    assert params["logging_mlflow_tracking_uri"] == "http://host:5000"


def data_in(folder: Path, annotations: str) -> Any:
    path = folder / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(annotations_path=path)


@pytest.mark.parametrize(
    ("annotations", "named"),
    [
        ("bccd/train/_annotations.coco.json", "bccd-"),
        ("bccd/annotations/instances_train.json", "bccd-"),
        ("BCCD.v3-raw/train/labels/data.yaml", "BCCD.v3-raw-"),
        (f"archives/{'0a' * 16}/train/_annotations.coco.json", ""),
        ("first/train/_annotations.coco.json", ""),
    ],
    ids=["split", "COCO", "YOLO", "unpacked archive", "same as the output folder"],
)
def test_a_run_is_named_after_network_data_set_and_output_folder(
    tmp_path: Path, annotations: str, named: str
) -> None:
    config = Config(model={"model_architecture": "rt_detr_v2", "backbone": "resnet50"})
    detector: Any = None  # not asked for a backbone that the configuration names
    name = run_name(config, detector, data_in(tmp_path, annotations), Path("models/first"))
    assert name.removesuffix("first") == f"rt_detr_v2-resnet50-{named}"


def test_the_name_of_a_run_lists_all_its_data_sets(tmp_path: Path) -> None:
    parts = tuple(data_in(tmp_path, f"{name}/train/a.json") for name in ("cups", "leagues", "cups"))
    data = Concatenation.__new__(Concatenation)
    object.__setattr__(data, "parts", parts)
    config = Config(model={"backbone": {"model_type": "resnet"}})
    detector: Any = None
    assert run_name(config, detector, data, Path("out")) == "detr-resnet-cups-leagues-out"
