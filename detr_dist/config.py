"""What to train: typed configuration, read from YAML and overrides. Imports no torch, to answer at once."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from detr_dist.config_data import DataConfig as DataConfig
from detr_dist.config_text import describe_problem, parse_value, read_yaml, set_key, split_override
from detr_dist.config_tiles import Tiles
from detr_dist.config_training import TrainingConfig as TrainingConfig
from detr_dist.config_types import (
    ClassLoss,
    ClassWeights,
    Count,
    EnvironmentDefault,
    Family,
    Mapping,
    Names,
    Probability,
    Section,
    ShareOrAuto,
    SizeBands,
    SwitchOrPath,
    Weights,
    keys_by_section,
    takes_text,
)
from detr_dist.errors import UsageError

_SQUARE_FAMILIES = frozenset({"rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr"})

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"  # MLflow's own default


class ModelConfig(Section):
    """The network, and the weights that it starts from."""

    model_architecture: Family = "detr"
    """`detr`, `conditional_detr`, `deformable_detr`, `dab_detr`, `rt_detr`, `rt_detr_v2`, `d_fine`, `deimv2`,
    `lw_detr`, `rf_detr`, or a family that you registered."""
    backbone: str | dict[str, Any] | None = None
    """Name of a timm backbone, or a mapping that is a transformers backbone configuration (with its
    `model_type`). Unset: resnet50, or the architecture's own (`lw_detr`, `rf_detr`)."""
    pretrained: str | None = None
    """Hub id or folder of a complete detector to fine-tune, e.g. facebook/detr-resnet-50; its class head is
    replaced."""
    pretrained_backbone: SwitchOrPath = True
    """Start the backbone from timm's ImageNet weights, downloaded once; or from the file at this path, a timm
    state dict (.safetensors or .pth), without internet. A model from `pretrained` includes its backbone."""
    freeze_batch_norm: Literal["auto", True, False] = "auto"
    """`auto` freezes the backbone's batch norm when it starts from pretrained weights, and trains it
    otherwise; `true` also freezes that of the necks of RT-DETR, D-FINE, DEIMv2 and LW-DETR."""
    num_classes: Count | None = None
    """Number of classes, checked against the data; unset: taken from the data."""
    hidden_dim: Count | None = None
    """Width of the transformer; unset: the value of the architecture or the pretrained model."""
    num_encoder_layers: Count | None = None
    """Encoder layers; unset: the value of the architecture or the pretrained model."""
    num_decoder_layers: Count | None = None
    """Decoder layers; unset: the value of the architecture or the pretrained model."""
    num_queries: Count | None = None
    """Largest number of objects that can be found in one image; unset: the value of the architecture or the
    pretrained model."""
    dropout: Probability | None = None
    """Dropout in the transformer; unset: the value of the architecture or the pretrained model."""
    class_loss: ClassLoss | None = None
    """Loss of the classes: `softmax` (cross entropy with "no object"), `focal`, `vfl` (varifocal), `mal`
    (matchability-aware, as in DEIM) or `ia_bce` (IoU-aware); unset: the architecture's. Only networks with
    "no object" take `softmax`, and they take no other."""
    config_overrides: Mapping = Field({})
    """Further options of the architecture's transformers configuration, by their names there."""


class LossConfig(Section):
    """The terms of the loss."""

    weights: Weights = Field({})
    """Weight of each term of the loss, e.g. {ce: 1, bbox: 5, giou: 2}; a term that is left out has the weight
    of the architecture's paper."""
    class_weights: ClassWeights = Field({})
    """Weight of each class in the loss of the classes, above 0, e.g. {ball: 4}: by it counts a query that is
    matched with an object of the class. Names are those of the data; a class that is left out has 1."""


class EvaluationConfig(Section):
    """When and how the validation images are evaluated."""

    every_epochs: Count = 10
    """Evaluate on the validation images after every N epochs, and always at the end."""
    score_threshold: ShareOrAuto = "auto"
    """Minimum score, 0 to 1, of the detections that count for precision, recall and F1; `auto`: for each
    class the one with the best F1."""
    size_bands: SizeBands = Field([])
    """Sides in pixels of the original image, e.g. [8, 16, 32, 96], between bands of sizes for which the AP of
    each class is logged as well, as `val_<class>_map_lt8`, `_8_16` and so on."""
    pictures: bool = True
    """Draw curves, the confusion matrix and the images with the worst errors at every evaluation, into
    OUTPUT_DIR/pictures and MLflow."""


class CheckpointConfig(Section):
    """When checkpoints are saved, and how many are kept."""

    every_epochs: Count = 10
    """Save checkpoints/epoch_N after every N epochs, and always at the end."""
    every_steps: Count | None = None
    """Save checkpoints/step_N after every N optimizer steps as well; set `keep_last` with it."""
    keep_last: Count | None = None
    """Keep only this many of the newest checkpoints epoch_N and step_N in the output folder, and as many of
    the newest checkpoints/epoch_N and models/epoch_N in MLflow, in addition to `best` and `last`; unset keeps
    all."""


class LoggingConfig(Section):
    """Where and how often metrics are logged."""

    mlflow: bool = True
    """Track the run in MLflow."""
    mlflow_tracking_uri: Annotated[str, Field(min_length=1)] = Field(
        default_factory=EnvironmentDefault("MLFLOW_TRACKING_URI", DEFAULT_TRACKING_URI)
    )
    """sqlite:///file.db, file:./folder, http://server:port, or any other URI that MLflow knows; unset: the
    environment variable MLFLOW_TRACKING_URI, if there is one."""
    mlflow_experiment_name: Annotated[str, Field(min_length=1)] = Field(
        default_factory=EnvironmentDefault("MLFLOW_EXPERIMENT_NAME", "detr_training")
    )
    """Experiment that the run belongs to, created if it does not exist; unset: MLFLOW_EXPERIMENT_NAME, if
    there is one."""
    mlflow_run_name: str | None = Field(default_factory=EnvironmentDefault("MLFLOW_RUN_NAME", None))
    """Name of the run; unset: MLFLOW_RUN_NAME, or else architecture, backbone, data set and output folder,
    e.g. rt_detr_v2-resnet50-bccd-first."""
    tensorboard: bool = True
    """Write TensorBoard event files to OUTPUT_DIR/tensorboard as well."""
    log_every_steps: Count = 10
    """Log losses and learning rate every N optimizer steps."""
    memory_every_steps: Count = 50
    """Log memory use every N optimizer steps."""
    trackers: Names = Field([])
    """Your own `Tracker` classes, as `package.module.Name` or `file.py:Name`, in addition to MLflow and
    TensorBoard."""
    register_model_as: Annotated[str, Field(pattern=r"^[^/:']+$")] | None = None
    """Name in MLflow's registry under which the best model becomes a new version at the end, with the alias
    `best`."""


class Config(Section):
    """All settings of a run; immutable. docs and `detr-dist train --help` list the keys."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = Field(
        default_factory=LoggingConfig
    )  # read the environment when a Config is made

    @model_validator(mode="after")
    def _augmentation_off_within_run(self) -> Self:
        if self.data.augmentation_off_epochs > self.training.num_epochs:
            raise ValueError(
                f"data.augmentation_off_epochs {self.data.augmentation_off_epochs} is more than "
                f"training.num_epochs {self.training.num_epochs}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _resize_of_family(cls, tree: Any) -> Any:
        match tree:
            case {"model": {"model_architecture": str(family)}} if family in _SQUARE_FAMILIES:
                data = tree.get("data") or {}
                if isinstance(data, dict) and "resize" not in data:
                    return {**tree, "data": {**data, "resize": "square"}}
        return tree

    @staticmethod
    def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> "Config":
        """Return the settings of a YAML file, or the defaults, changed by `section.key=value`.

        Raises:
            UsageError: naming every problem at once.
        """
        return load_config(None if path is None else Path(path), overrides)

    def to_yaml(self) -> str:
        """Return the resolved configuration without credentials, as YAML that `load` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def specific_tiles(config: Config) -> Tiles | None:
    """Return `data.tiles`, which only training can resolve from `auto`.

    Raises:
        UsageError: it is `auto`.
    """
    tiles = config.data.tiles
    if tiles == "auto":
        raise UsageError(
            "data.tiles=auto: only a training chooses windows, by its boxes; give data.tiles={size: 640}, or "
            "null for full images"
        )
    return tiles


_SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}

FROM_ENVIRONMENT: dict[str, EnvironmentDefault] = {
    name: field.default_factory
    for name, field in LoggingConfig.model_fields.items()
    if isinstance(field.default_factory, EnvironmentDefault)
}
"""Keys of the section `logging` whose defaults come from environment variables."""

_TEXTS = [
    (name, key)
    for name, section in _SECTIONS.items()
    for key, field in section.model_fields.items()
    if takes_text(field.annotation)
]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (none: the defaults), then apply `section.key=value` overrides.

    Raises:
        UsageError: naming every problem at once, one line each, with the nearest valid key for an unknown
        one.
    """
    tree, texts = read_yaml(path) if path is not None else ({}, {})
    return _resolve(tree, texts, overrides, source=f"{path}: " if path is not None else "")


def override_config(config: Config, overrides: Sequence[str], *, only_known_names: bool = True) -> Config:
    """Return the same configuration with `section.key=value` overrides.

    Without `only_known_names`, names of transforms, families and loss terms may be unknown here.

    Raises:
        UsageError: as `load_config`.
    """
    return _resolve(config.model_dump(), {}, overrides, source="", only_known_names=only_known_names)


def _resolve(
    tree: dict[str, Any],
    texts: dict[str, Any],
    overrides: Sequence[str],
    *,
    source: str,
    only_known_names: bool = True,
) -> Config:
    overridden = tuple(".".join(split_override(override)[0]) for override in overrides)
    for override in overrides:
        keys, value_text = split_override(override)
        value, text = parse_value(override, value_text)
        set_key(tree, keys, value)
        set_key(texts, keys, text)
    tree = {name: {} if section is None else section for name, section in tree.items()}
    _take_texts(tree, texts)
    for key in FROM_ENVIRONMENT:
        if isinstance(tree.get("logging"), dict) and tree["logging"].get(key) is None:
            tree["logging"].pop(key, None)
    try:
        if isinstance(training := tree.get("training"), dict) and training.get("extensions"):
            only_known_names = False
        return Config.model_validate(tree, context={"only_known_names": only_known_names})
    except ValidationError as error:
        known = dict(keys_by_section(_SECTIONS))
        lines = [describe_problem(problem, known) for problem in error.errors()]
        lines = [line if line.startswith(overridden) else source + line for line in lines]
        raise UsageError("\n".join(lines)) from None


def _take_texts(tree: dict[str, Any], texts: dict[str, Any]) -> None:
    """Keep texts as they are written: YAML reads 123_4 as the number 1234, 007 as 7, on as true."""
    for section, key in _TEXTS:
        if isinstance(tree.get(section), dict) and isinstance(tree[section].get(key), bool | int | float):
            tree[section][key] = (texts.get(section) or {}).get(key) or str(tree[section][key])


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Yield every configuration key with its default and its meaning, for `--help`."""
    for section_name, section in _SECTIONS.items():
        for name, field in section.model_fields.items():
            known = FROM_ENVIRONMENT.get(name)
            default = known.otherwise if known is not None else field.default
            yield f"{section_name}.{name}", json.dumps(default), field.description or ""
