"""Types of configuration values and sections; they refuse values that YAML reads as another type."""

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

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
from pydantic_core import PydanticCustomError

from detr_dist.errors import UsageError
from detr_dist.extensions import FAMILIES, LOSSES, RECIPES, TRANSFORMS, Registry
from detr_dist.redaction import redact_value
from detr_dist.serving.settings import ExifRule as ExifRule
from detr_dist.serving.settings import ResizeMode as ResizeMode


def _wanted(what: str, accepts: Callable[[Any], bool]) -> BeforeValidator:
    """Refuse other values with one message; pydantic has one for each member of a union."""

    def check(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"{what} is wanted")
        return value

    return BeforeValidator(check)


def _is_fraction(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 <= float(value) <= 1
    except (TypeError, ValueError):
        return False


def _is_name_or_names(value: Any) -> bool:
    return all(isinstance(each, str) and each for each in (value if isinstance(value, list) else [value]))


def _switch(value: Any) -> Any:
    """Accept a path object as text, and a quoted true or false."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _recipe_first(value: Any) -> Any:
    """Require the recipe first: transforms change the image that it has cropped and resized."""
    if isinstance(value, list) and any(name in RECIPES for name in value[1:]):
        raise ValueError(f"of {', '.join(RECIPES)} there is one at most, and it comes first")
    return value


def _as_short_as_possible(value: Any) -> Any:
    """Give lists that mean the same one form, so that a resumed run does not count as changed."""
    names = [value] if isinstance(value, str) else [name for name in value if name != "none"]
    return names if len(names) > 1 else (names or ["none"])[0]


def _ascending(values: list[int]) -> list[int]:
    if any(low >= high for low, high in pairwise(values)):
        raise ValueError("ascending numbers are wanted")
    return values


def _known(registry: Registry[Any]) -> Callable[[Any, ValidationInfo], Any]:
    """Refuse names that are not registered, unless an extension may still register them."""

    def check(value: Any, info: ValidationInfo) -> Any:
        names = [value] if isinstance(value, str) else list(value)
        known = registry.names
        unknown = [name for name in names if not registry.knows(name)]
        if unknown and (info.context or {}).get("only_known_names"):
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
            text = f"there is no {registry.kind} {unknown[0]!r}; {hint}"
            raise PydanticCustomError("unknown_name", "{text}", {"text": text})
        return value

    return check


@dataclass(frozen=True)
class EnvironmentDefault:
    """Default of a setting, taken from an environment variable of MLflow; an empty one counts as unset."""

    variable: str
    otherwise: str | None

    def __call__(self) -> Any:
        """Return the variable's value, or the default without it."""
        return self.value or self.otherwise

    @property
    def value(self) -> str | None:
        """Value of the environment variable; None if it is unset or empty."""
        return os.environ.get(self.variable) or None


# YAML reads a bare `true` as a boolean, which Python would count as the number 1.
_NO_BOOL = _wanted("a number, not true or false,", lambda value: not isinstance(value, bool))

# YAML reads a key with nothing below it as null.
_EMPTY_MAPPING = BeforeValidator(lambda value: {} if value is None else value)

# A single number means a list of one number.
_ONE_OR_MORE = BeforeValidator(
    lambda value: [] if value is None else value if isinstance(value, list | tuple) else [value]
)

Count = Annotated[int, _NO_BOOL, Field(ge=1)]
CountOrZero = Annotated[int, _NO_BOOL, Field(ge=0)]
Positive = Annotated[float, _NO_BOOL, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, _NO_BOOL, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, _NO_BOOL, Field(ge=0, lt=1)]
Share = Annotated[float, _NO_BOOL, Field(ge=0, le=1)]
Factor = Annotated[float, _NO_BOOL, Field(gt=0, le=1)]
Seed = Annotated[int, _NO_BOOL, Field(ge=0, lt=2**32)]
Edge = Annotated[int, _NO_BOOL, Field(ge=32)]
CountOrAuto = Annotated[
    Literal["auto"] | int,
    _wanted(
        "a whole number from 0 or auto", lambda value: value == "auto" or (type(value) is int and value >= 0)
    ),
]
ShareOrAuto = Annotated[
    Literal["auto"] | float,
    _wanted("a number from 0 to 1 or auto", lambda value: value == "auto" or _is_fraction(value)),
]
SwitchOrPath = Annotated[
    bool | str,
    _wanted("true, false or the path of a file", lambda value: isinstance(value, bool | str) and value != ""),
    BeforeValidator(_switch),
]
ClassLoss = Literal["softmax", "focal", "vfl", "mal", "ia_bce"]
# YAML reads a bare `no` as false.
Precision = Annotated[
    Literal["auto", "no", "fp16", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
]
Augmentation = Annotated[
    str | list[str],
    _wanted("a name or a list of names", _is_name_or_names),
    AfterValidator(_known(TRANSFORMS)),
    AfterValidator(_recipe_first),
    AfterValidator(_as_short_as_possible),
]
Family = Annotated[str, AfterValidator(_known(FAMILIES))]
# A single name means a list of one name; a key without a value means an empty list.
Names = Annotated[
    list[str],
    BeforeValidator(lambda value: [] if value is None else [value] if isinstance(value, str) else value),
]
Edges = Annotated[list[Edge], _ONE_OR_MORE]
SizeBands = Annotated[list[Count], _ONE_OR_MORE, AfterValidator(_ascending)]
Mapping = Annotated[dict[str, Any], _EMPTY_MAPPING]
ClassWeights = Annotated[dict[str, Positive], _EMPTY_MAPPING]
Weights = Annotated[dict[str, PositiveOrZero], _EMPTY_MAPPING, AfterValidator(_known(LOSSES))]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        """Refuse every change.

        Raises:
            UsageError: always; the message says how to make a changed configuration.
        """
        raise UsageError(
            f"{type(self).__name__}.{name} cannot be set, because a configuration never changes; pass "
            f"section.key=value to Config.load, or make a copy: .model_copy(update={{{name!r}: ...}})"
        )

    @model_serializer(mode="wrap")
    def _serialise(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        """Redact credentials in JSON, because JSON is what gets written to files."""
        values = handler(self)
        return redact_value(values) if info.mode == "json" else values


class CopyPasteConfig(Section):
    """Objects that are pasted into other images."""

    classes: Annotated[Names, Field(min_length=1)]
    """Names of their classes."""
    most: Count = 3
    """Largest number in one image; every number from 0 on is equally likely."""


CopyPasteOrNone = Annotated[
    CopyPasteConfig | None,
    _wanted(
        "a mapping as {classes: [ball], most: 3}",
        lambda value: value is None or isinstance(value, dict | CopyPasteConfig),
    ),
]


def keys_by_section(sections: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the keys of each section, and of each mapping with fixed keys in one."""
    for name, section in sections.items():
        yield name, list(section.model_fields)
        for key, field in section.model_fields.items():
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    yield f"{name}.{key}", list(kind.model_fields)


def takes_text(annotation: Any) -> bool:
    """Return whether a setting of this type may be any text."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return any(map(takes_text, get_args(annotation)))
    return annotation is str
