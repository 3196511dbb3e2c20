"""Train, evaluate and use DETR-family object detectors.

The names below are imported when they are first used: `import detr_dist` takes no time and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from detr_dist.config import Config
    from detr_dist.errors import DetrDistError
    from detr_dist.evaluation.detections import Detections
    from detr_dist.extensions import register_loss, register_transform
    from detr_dist.inference.evaluate import evaluate
    from detr_dist.inference.export import export
    from detr_dist.inference.model import load_model
    from detr_dist.models.families import Family, register_family
    from detr_dist.tracking.tracker import Tracker
    from detr_dist.training.callback import Callback
    from detr_dist.training.trainer import train

_MODULES = {
    "Callback": "training.callback",
    "Config": "config",
    "DetrDistError": "errors",
    "Detections": "evaluation.detections",
    "Family": "models.families",
    "Tracker": "tracking.tracker",
    "evaluate": "inference.evaluate",
    "export": "inference.export",
    "load_model": "inference.model",
    "register_family": "models.families",
    "register_loss": "extensions",
    "register_transform": "extensions",
    "train": "training.trainer",
}

__all__ = [
    "Callback",
    "Config",
    "Detections",
    "DetrDistError",
    "Family",
    "Tracker",
    "evaluate",
    "export",
    "load_model",
    "register_family",
    "register_loss",
    "register_transform",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
