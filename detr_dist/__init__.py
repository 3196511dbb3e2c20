"""Train, evaluate and use DETR-family object detectors.

The names below are imported when they are first used: `import detr_dist` takes no time and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from detr_dist.config import Config
    from detr_dist.errors import DetrDistError
    from detr_dist.extensions import register_loss, register_transform
    from detr_dist.tracking.tracker import Tracker

_MODULES = {
    "Config": "config",
    "DetrDistError": "errors",
    "Tracker": "tracking.tracker",
    "register_loss": "extensions",
    "register_transform": "extensions",
}

__all__ = [
    "Config",
    "DetrDistError",
    "Tracker",
    "register_loss",
    "register_transform",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
