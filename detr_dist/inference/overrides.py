"""Handling of `section.key=value` overrides for a trained model."""

import logging
from collections.abc import Sequence

from detr_dist.config import Config, load_config
from detr_dist.extensions import import_extensions

TRACKING_URI_KEY, EXTENSIONS_KEY = "logging.mlflow_tracking_uri", "training.extensions"
KEYS_WITH_EFFECT = (
    "data.",
    "evaluation.score_threshold",
    "evaluation.size_bands",
    TRACKING_URI_KEY,
    "training.batch_size",
    "training.channels_last",
    "training.deterministic",
    EXTENSIONS_KEY,
    "training.mixed_precision",
    "training.tf32",
)

_logger = logging.getLogger(__name__)


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the keys of the overrides."""
    return [each.partition("=")[0] for each in overrides]


def tracking_uri_for(given: str | None, overrides: Sequence[str] = ()) -> str:
    """Return the tracking URI among the overrides, else the given one, else the environment's or default."""
    if given is not None and TRACKING_URI_KEY not in keys_of(overrides):
        return given
    return _only(TRACKING_URI_KEY, overrides).logging.mlflow_tracking_uri


def import_overrides(overrides: Sequence[str]) -> None:
    """Import the extensions that are among the overrides.

    Raises:
        UsageError: one cannot be imported.
    """
    import_extensions(_only(EXTENSIONS_KEY, overrides).training.extensions)


def warn_of_no_effect(overrides: Sequence[str]) -> None:
    """Log a warning for each override that has no effect on a trained model."""
    for key in keys_of(overrides):
        if not key.startswith(KEYS_WITH_EFFECT):
            _logger.warning(f"{key}: has no effect here")


def _only(key: str, overrides: Sequence[str]) -> Config:
    """Return the default configuration with the overrides of one key."""
    return load_config(None, [each for each in overrides if each.partition("=")[0] == key])
