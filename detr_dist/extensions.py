"""Extension points: registered transforms, loss terms and families, and imports of users' modules.

Imports no torch, so that the configuration can be checked against the names.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from detr_dist.errors import UsageError, as_one_line

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind under the names that a configuration uses."""

    def __init__(self, kind: str, *, built_in: Iterable[str] = (), takes_paths: bool = False) -> None:
        """Reserve the names `built_in` for the package itself; with `takes_paths`, `find` imports paths."""
        self.kind = kind
        self.built_in = tuple(built_in)
        self._takes_paths = takes_paths
        self._objects: dict[str, T] = {}
        self._origins: dict[str, tuple[str, str]] = {}

    @property
    def names(self) -> list[str]:
        """Return all names, the package's own first."""
        return [*self.built_in, *(name for name in self._objects if name not in self.built_in)]

    def knows(self, name: str) -> bool:
        """Return whether `name` is registered, or a path that may lead to an object."""
        return name in self.names or (self._takes_paths and is_path(name))

    def add(self, name: str, value: T, *, origin: tuple[str, str] | None = None) -> None:
        """Register `value`; the same definition, executed again as in a notebook, replaces the earlier one.

        Args:
            name: Name in the configuration.
            value: The object.
            origin: Module and name of the definition, for a value without `__module__` and `__qualname__`.

        Raises:
            UsageError: another definition has that name.
        """
        origin = origin or _origin(value)
        is_foreign = name in self.built_in and not origin[0].startswith("detr_dist.")
        if is_foreign or self._origins.get(name, origin) != origin:
            raise UsageError(f"the {self.kind} {name!r} exists already; register yours under another name")
        self._objects[name], self._origins[name] = value, origin

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class or function."""

        def decorate(value: T) -> T:
            self.add(name, value)
            return value

        return decorate

    def find(self, name: str, key: str) -> T:
        """Return the object that is registered as `name`, or the one at that path.

        Paths have the form `package.module.Name` or `file.py:Name`.

        Raises:
            UsageError: there is none; the message names the configuration's `key`.
        """
        if name in self._objects:
            return self._objects[name]
        if self._takes_paths and is_path(name):
            return load_object(name, key)  # type: ignore[no-any-return]
        raise UsageError(
            f"{key}: there is no {self.kind} {name!r}; known are {', '.join(self.names)}; those of your own "
            "are registered by a module in training.extensions"
        )


def _origin(value: Any) -> tuple[str, str]:
    value = value.func if isinstance(value, functools.partial) else value
    named = value if hasattr(value, "__qualname__") else type(value)
    return named.__module__, named.__qualname__


def is_path(name: str) -> bool:
    """Return whether `name` is a dotted path or `file.py:Name` instead of a registered name."""
    return "." in name or ":" in name


def load_object(path: str, key: str) -> Any:
    """Return the object at `package.module.Name`, `package.module:Name` or `file.py:Name`.

    Raises:
        UsageError: it cannot be imported; the message names the configuration's `key`.
    """
    module, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    try:
        if not module or not name:
            raise ImportError("a module and a name in it are needed, as in package.module.Name")
        return pkgutil.resolve_name(f"{_import(module).__name__}:{name}")
    except Exception as error:  # users' code may raise anything
        raise UsageError(f"{key}: {path} cannot be imported: {as_one_line(error)}") from error


def instantiate(path: str, key: str) -> Any:
    """Return an instance of the class at `path`, created without arguments.

    Raises:
        UsageError: there is no such class, or it needs arguments or raises; the message names the
            configuration's `key`.
    """
    factory = load_object(path, key)
    try:
        return factory()
    except Exception as error:  # users' code may raise anything
        raise UsageError(
            f"{key}: {path}() failed ({as_one_line(error)}); it is called without arguments"
        ) from error


def import_extensions(names: Iterable[str]) -> None:
    """Import each of the modules (by dotted name) and `.py` files (by path) once.

    Raises:
        UsageError: one cannot be imported.
    """
    for name in names:
        try:
            _import(name)
        except Exception as error:  # of any kind: it is the user's code
            raise UsageError(
                f"training.extensions: {name} cannot be imported: {as_one_line(error)}"
            ) from error


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        here = str(Path.cwd())
        if here not in sys.path:  # a command's own sys.path lacks the working directory
            sys.path.append(here)
        return importlib.import_module(name)
    path = Path(name).resolve()
    known = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == str(path)), None)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    if path.stem in sys.modules:
        raise ImportError(f"a module named {path.stem} is loaded already; rename the file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as Python's own import does, for pickling
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


RECIPES = ("none", "light", "detr", "footage")
"""Augmentations that decide the size of an image before it is decoded; one at most."""

FOOTAGE = ("scale_out", "motion_blur", "sensor_noise", "gamma", "jpeg")
"""The transforms that the recipe `footage` adds to `detr`, in the order in which they happen: the view, the
lens, the sensor, the camera, the codec."""

TRANSFORMS: Registry[Any] = Registry(
    "augmentation",
    built_in=(*RECIPES, "mosaic", "mixup", "photometric", "zoom_out", "iou_crop", *FOOTAGE),
    takes_paths=True,
)
LOSSES: Registry[Any] = Registry(
    "part of the loss", built_in=("ce", "bbox", "giou", "vfl", "mal", "ia_bce", "fgl", "ddf")
)
FAMILIES: Registry[Any] = Registry(
    "family",
    built_in=(
        "detr",
        "conditional_detr",
        "deformable_detr",
        "dab_detr",
        "rt_detr",
        "rt_detr_v2",
        "d_fine",
        "deimv2",
        "lw_detr",
        "rf_detr",
    ),
)

register_transform = TRANSFORMS.register
"""Decorator: register a transform under the name that `data.augmentation` uses."""

register_loss = LOSSES.register
"""Decorator: register a term of the loss under the name that `loss.weights` uses."""
