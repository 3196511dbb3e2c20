"""Types of configuration values, which refuse what YAML reads as something else, and of sections."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
)

from detr_dist.extensions import FAMILIES, LOSSES, RECIPES, TRANSFORMS, Registry, is_path
from detr_dist.redaction import redact_value


def no_bool(value: Any) -> Any:
    """YAML reads a bare `true` as a boolean, which Python would count as the number 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def precision_name(value: Any) -> Any:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


def _switch_or_path(value: Any) -> Any:
    """One complaint instead of pydantic's two, one for each kind that it could have been."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, bool | str) or value == "":
        raise ValueError("true, false or the path of a file is wanted")
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _share_or_auto(value: Any) -> Any:
    """One complaint instead of pydantic's two, one for each kind that it could have been."""
    try:
        is_share = value == "auto" or (not isinstance(value, bool) and 0 <= float(value) <= 1)
    except (TypeError, ValueError):
        is_share = False
    if not is_share:
        raise ValueError("a number from 0 to 1 or auto is wanted")
    return value


def _count_or_auto(value: Any) -> Any:
    """One complaint instead of pydantic's two, as above."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError("a whole number from 0 or auto is wanted")
    return value


def _name_or_names(value: Any) -> Any:
    """One complaint instead of pydantic's two, as above; YAML reads a bare `none` as text, `null` as None."""
    if not isinstance(value, str) and not (isinstance(value, list) and all(map(_is_name, value))):
        raise ValueError("a name or a list of names is wanted")
    return value


def _recipe_first(value: Any) -> Any:
    """Transforms change what the recipe has cropped and resized."""
    if isinstance(value, list) and any(name in RECIPES for name in value[1:]):
        raise ValueError(f"of {', '.join(RECIPES)} there is one at most, and it comes first")
    return value


def _names(value: Any) -> Any:
    """A single name stands for a list of one; a key with nothing after it for none."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _known(registry: Registry[Any]) -> Callable[[Any, ValidationInfo], Any]:
    """Refuse names that are not registered, where no extension may still register them."""

    def check(value: Any, info: ValidationInfo) -> Any:
        names = [value] if isinstance(value, str) else list(value)
        known = registry.names
        unknown = [name for name in names if name not in known and not is_path(name)]
        if unknown and (info.context or {}).get("only_known_names"):
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            raise ValueError(f"there is no {registry.kind} {unknown[0]!r}; {hint}")
        return value

    return check


def _empty_mapping(value: Any) -> Any:
    """YAML reads a key with nothing below it as null."""
    return {} if value is None else value


@dataclass(frozen=True)
class EnvironmentDefault:
    """Default of a setting that an environment variable of MLflow decides; an empty one counts as unset."""

    variable: str
    otherwise: str | None

    def __call__(self) -> Any:
        return self.value or self.otherwise

    @property
    def value(self) -> str | None:
        return os.environ.get(self.variable) or None


Count = Annotated[int, BeforeValidator(no_bool), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(no_bool), Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, BeforeValidator(no_bool), Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, BeforeValidator(no_bool), Field(ge=0, lt=1)]
Augmentation = Annotated[
    str | list[str],
    BeforeValidator(_name_or_names),
    AfterValidator(_known(TRANSFORMS)),
    AfterValidator(_recipe_first),
]
Family = Annotated[str, AfterValidator(_known(FAMILIES))]
Names = Annotated[list[str], BeforeValidator(_names)]
CountOrAuto = Annotated[Literal["auto"] | int, BeforeValidator(_count_or_auto)]
SwitchOrPath = Annotated[bool | str, BeforeValidator(_switch_or_path)]
ShareOrAuto = Annotated[Literal["auto"] | float, BeforeValidator(_share_or_auto)]
Mapping = Annotated[dict[str, Any], BeforeValidator(_empty_mapping)]
Weights = Annotated[
    dict[str, PositiveOrZero], BeforeValidator(_empty_mapping), AfterValidator(_known(LOSSES))
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_serializer(mode="wrap")
    def _serialise(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        """As JSON, which is written, a section holds no credentials."""
        values = handler(self)
        return redact_value(values) if info.mode == "json" else values
