"""What to train: typed configuration, read from YAML and from `section.key=value` overrides.

Accelerate's own YAML says how to distribute; nothing here repeats it. This module imports no torch, so that
`--help` and configuration errors answer at once.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from detr_dist.errors import UsageError

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
"""MLflow's own default."""


def _no_bool(value: Any) -> Any:
    """YAML reads a bare `true` as a boolean, which Python would count as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _precision_name(value: Any) -> Any:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


def _share_or_auto(value: Any) -> Any:
    """One complaint instead of pydantic's two, one for each kind that it could have been."""
    try:
        is_share = value == "auto" or (not isinstance(value, bool) and 0 <= float(value) <= 1)
    except (TypeError, ValueError):
        is_share = False
    if not is_share:
        raise ValueError("a number from 0 to 1 or auto is wanted")
    return value


Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
ShareOrAuto = Annotated[Literal["auto"] | float, BeforeValidator(_share_or_auto)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class DataConfig(Section):
    num_workers: CountOrZero = 4
    """Loader processes per training process; 0 loads in the training process itself."""
    prefetch_factor: Count = 4
    """Micro-batches that each loader process prepares ahead."""
    shortest_edge: Annotated[int, Field(ge=32)] = 800
    """Pixels of an image's shorter side after the resize."""
    longest_edge: Annotated[int, Field(ge=32)] = 1333
    """Upper limit in pixels of an image's longer side after the resize; wins over `shortest_edge`."""
    augmentation: Literal["none", "light", "detr"] = "detr"
    """`none`; `light`: flip and mild colour changes; `detr`: those, random crops and the published
    multi-scale resize."""
    group_by_shape: bool = True
    """Make each optimizer step of images that are of like height and width once augmented: all of a step are
    padded to the largest. Where all are of one size, nothing changes; `false` mixes them as published."""
    canvas_multiple: Count = 32
    """Round the height and width to which a step's images are padded up to multiples of so many pixels: a
    GPU plans its work anew for each new size. 1 does not round. Without the augmentation `detr` images of one
    size stay unpadded."""

    @model_validator(mode="after")
    def _edges_in_order(self) -> Self:
        if self.longest_edge < self.shortest_edge:
            raise ValueError(
                f"longest_edge {self.longest_edge} is less than shortest_edge {self.shortest_edge}"
            )
        return self


class ModelConfig(Section):
    model_architecture: Literal["detr", "conditional_detr", "deformable_detr", "dab_detr"] = "detr"
    """Member of the DETR family."""
    backbone: str | dict[str, Any] = "resnet50"
    """Name of a timm backbone, or a mapping that is a transformers backbone configuration (with its
    `model_type`)."""
    pretrained: str | None = None
    """Hub id or folder of a whole detector to fine-tune, e.g. facebook/detr-resnet-50; its class head is made
    anew."""
    pretrained_backbone: bool = True
    """Start the backbone from timm's ImageNet weights."""
    freeze_batch_norm: Literal["auto", True, False] = "auto"
    """`auto` freezes the backbone's batch norm when it starts from pretrained weights, and trains it
    otherwise."""
    num_classes: Count | None = None
    """Checked against the data when given; the data decide otherwise."""
    hidden_dim: Count | None = None
    """Width of the transformer; unset: the architecture's or the pretrained model's own."""
    num_encoder_layers: Count | None = None
    """Encoder layers; unset: the architecture's or the pretrained model's own."""
    num_decoder_layers: Count | None = None
    """Decoder layers; unset: the architecture's or the pretrained model's own."""
    num_queries: Count | None = None
    """Most objects that can be found in one image; unset: the architecture's or the pretrained model's
    own."""
    dropout: Probability | None = None
    """Dropout in the transformer; unset: the architecture's or the pretrained model's own."""
    config_overrides: dict[str, Any] = {}
    """Further options of the architecture's transformers configuration, by their names there."""


class TrainingConfig(Section):
    batch_size: Count = 4
    """Images per process and micro-batch."""
    num_epochs: Count = 300
    """Passes over the training images."""
    max_steps: Count | None = None
    """End after this many optimizer steps, if that comes before `num_epochs`; the learning-rate schedule
    still spans `num_epochs`, so that a run that was cut short and resumed is the whole run."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of everything but the backbone."""
    learning_rate_backbone: PositiveOrZero = 1e-5
    """Peak learning rate of the backbone; 0 freezes it."""
    weight_decay: PositiveOrZero = 1e-4
    """AdamW's decoupled decay; norms and biases are left out."""
    gradient_clip: PositiveOrZero = 0.1
    """Largest L2 norm of all gradients together; 0 does not clip."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per process and optimizer step."""
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(_precision_name)] = (
        "auto"
    )
    """Autocast precision of the network; the loss is always computed in float32. `auto`: the one that
    accelerate launch was given, else bf16 where the GPU computes it natively, else no."""
    tf32: bool = True
    """Let a GPU round the factors of float32 convolutions and matrix products to TF32, which is faster;
    `false` keeps them exact. No effect on the CPU."""
    deterministic: bool = False
    """Choose deterministic algorithms where torch has them, which can be slower; on a GPU a warning names
    what has none. The CPU is deterministic without it."""
    compile_model: bool = False
    """Compile backbone and layers with torch.compile: minutes before the first step, faster ones after."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower steps."""
    channels_last: bool = False
    """Keep images and convolution weights in channels-last memory order."""
    seed: Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)] = 42
    """Decides initial weights, order of samples, augmentation and dropout."""
    lr_schedule: Literal["step", "cosine", "constant"] = "step"
    """After the warm-up: `step` divides by 10 after two thirds of all steps, `cosine` falls to 0, `constant`
    stays."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps over which the learning rate rises linearly to its peak."""
    ema_decay: Probability = 0.0
    """Evaluate and save a moving average of the weights, e.g. 0.9998; shorter in the first steps; 0 does not
    average."""
    early_stopping_patience: CountOrZero = 0
    """End after so many evaluations in a row without a better `val_map`; 0 never does."""


class EvaluationConfig(Section):
    every_epochs: Count = 10
    """Evaluate on the validation images after every so many epochs, and always at the end."""
    score_threshold: ShareOrAuto = "auto"
    """Least score, 0 to 1, of the detections that count for precision, recall and F1; `auto`: for each class
    the one with the best F1."""
    pictures: bool = True
    """Draw curves, confusions and the images with the worst errors at every evaluation, into
    OUTPUT_DIR/pictures and MLflow."""


class CheckpointConfig(Section):
    every_epochs: Count = 10
    """Save checkpoints/epoch_N after every so many epochs, and always at the end."""
    every_steps: Count | None = None
    """Save checkpoints/step_N after every so many optimizer steps as well; set `keep_last` with it."""
    keep_last: Count | None = None
    """Keep only so many of the newest checkpoints epoch_N and step_N in the output folder, and so many of
    the newest checkpoints/epoch_N and models/epoch_N in MLflow, beside `best` and `last`; unset keeps
    all."""


class LoggingConfig(Section):
    mlflow: bool = True
    """Track the run in MLflow."""
    mlflow_tracking_uri: str = DEFAULT_TRACKING_URI
    """sqlite:///file.db, file:./folder, http://server:port, or any other URI that MLflow knows."""
    mlflow_experiment_name: Annotated[str, Field(min_length=1)] = "detr_training"
    """Experiment that the run belongs to; made if there is none."""
    mlflow_run_name: str | None = None
    """Name of the run; MLflow invents one if unset."""
    tensorboard: bool = True
    """Write TensorBoard event files to OUTPUT_DIR/tensorboard as well."""
    log_every_steps: Count = 10
    """Log losses and learning rate every so many optimizer steps."""
    memory_every_steps: Count = 50
    """Log memory use every so many optimizer steps."""
    register_model_as: Annotated[str, Field(pattern=r"^[^/:']+$")] | None = None
    """Name in MLflow's registry under which the best model becomes a new version at the end, with the alias
    `best`."""


class Config(Section):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def to_yaml(self) -> str:
        """The resolved configuration, loadable by `load_config`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (none: the defaults), then apply `section.key=value` overrides.

    Raises:
        UsageError: naming every problem at once, one line each, with the nearest valid key for an unknown
        one.
    """
    tree = _read_yaml(path) if path is not None else {}
    return _resolve(tree, overrides, source=f"{path}: " if path is not None else "")


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """The same configuration with `section.key=value` overrides.

    Raises:
        UsageError: as `load_config`.
    """
    return _resolve(config.model_dump(mode="json"), overrides, source="")


def _resolve(tree: dict[str, Any], overrides: Sequence[str], *, source: str) -> Config:
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(source + _describe(problem) for problem in error.errors())) from None


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Every configuration key with its default and its meaning, for `--help`."""
    for section_name, section_field in Config.model_fields.items():
        section = type(section_field.default)
        for name, field in section.model_fields.items():
            yield f"{section_name}.{name}", json.dumps(field.default), field.description or ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not a text file; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            f"--config {path}: sections such as `training:` are wanted, found a {type(tree).__name__}"
        )
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key. A dotted path may go deeper than section.key, into a mapping such as
    model.config_overrides."""
    keys_text, equals, value_text = override.partition("=")
    keys = keys_text.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UsageError(f"{override!r} is not of the form section.key=value, e.g. training.batch_size=8")
    try:
        value = yaml.safe_load(value_text)
    except yaml.YAMLError:
        raise UsageError(
            f"{override!r}: the value is not valid YAML; quote it if it holds special characters"
        ) from None
    node = tree
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[keys[-1]] = value


def _describe(problem: Any) -> str:
    """One line for one of pydantic's errors: the key as the user writes it, what is wrong, what to do."""
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _describe_unknown(location)
    key = ".".join(location[:2])
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, dict) and problem["type"] == "value_error" else f", got {value!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}"


def _describe_unknown(location: list[str]) -> str:
    sections = Config.model_fields
    if len(location) == 1:
        known = list(sections)
        every_key = [key for key, _, _ in describe_keys() if key.endswith("." + location[0])]
        nearest = every_key or difflib.get_close_matches(location[0], known, n=1, cutoff=0.4)
    else:
        known = list(type(sections[location[0]].default).model_fields)
        elsewhere = [key for key, _, _ in describe_keys() if key.endswith("." + location[1])]
        close = difflib.get_close_matches(location[1], known, n=1, cutoff=0.4)
        nearest = elsewhere or [f"{location[0]}.{name}" for name in close]
    hint = f"did you mean {nearest[0]}?" if nearest else f"valid keys: {', '.join(known)}"
    return f"{'.'.join(location)}: unknown configuration key; {hint}"
