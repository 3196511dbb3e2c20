"""Running a saved model with the libraries alone: each model's folder has a copy of these modules.

They import nothing else of the package. Training, evaluation and prediction use them too, so that a served
model returns what `detr-dist predict` does.
"""

from pathlib import Path
from typing import Any


def _load_pyfunc(path: str) -> Any:
    """Load the model in the folder `path`, for MLflow's `python_function`."""
    from .scoring import ServedModel  # slow to import

    return ServedModel(Path(path))
