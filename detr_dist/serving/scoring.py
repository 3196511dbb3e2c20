"""A saved model as MLflow's `python_function`: requests with images to rows of detections."""

import base64
import binascii
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import Tensor

from .decoding import UnreadableImageError, decode_content, decode_rgb, pixels_of
from .predictor import Predictor
from .settings import ExifRule
from .tiles import Found

COLUMN = "image"
_SERVER_VARIABLE = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"
"""Set by MLflow's scoring server, where a request must not read the files of the host."""
_LONGEST_PATH = 4096
_MOST_NAMED = 10
"""Unusable images that a message names."""
_FORMS = "base64 or a data: URL, bytes, a path, a Pillow image, or an array uint8 [H, W] or [H, W, 3 or 4]"


class RefusedRequestError(MlflowException):
    """A request that cannot be answered, with status 400 and a message that stays as it is.

    MLflow's scoring server would add the data of the request, megabytes of base64.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The message."""
        return str(self.__dict__["message"])

    @message.setter
    def message(self, value: str) -> None:
        self.__dict__.setdefault("message", value)


class ServedModel:
    """Detects objects in the images of the column `image`."""

    def __init__(self, folder: Path) -> None:
        self._predictor = Predictor(folder)

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return a row for each image: its `detections`, by descending score.

        Raises:
            RefusedRequestError: an image cannot be used; the message names its index.
        """
        settings, params = self._predictor.settings, params or {}
        threshold, most = params.get("threshold"), params.get("max_detections")
        if threshold is not None and not 0 <= threshold <= 1:
            raise RefusedRequestError(f"threshold {threshold}: a minimum score is a number from 0 to 1")
        if most is not None and most < 0:
            raise RefusedRequestError(f"max_detections {most}: a number from 0, or null for all")
        least = settings.thresholds if threshold is None else (threshold,) * len(settings.class_names)
        prepared, unusable = [], list[str]()
        for index, value in enumerate(_flat(model_input[COLUMN])):
            try:
                prepared.append(self._predictor.prepare(_pixels(value, f"image {index}", settings.exif)))
            except UnreadableImageError as error:
                unusable.append(str(error))
        if unusable:
            more = f"; and {len(unusable) - _MOST_NAMED} more" if len(unusable) > _MOST_NAMED else ""
            raise RefusedRequestError("; ".join(unusable[:_MOST_NAMED]) + more)
        found = self._predictor.detect(prepared)
        return pd.DataFrame({"detections": [self._rows(each, least)[:most] for each in found]}, dtype=object)

    def _rows(self, found: Found, least: tuple[float, ...]) -> list[dict[str, Any]]:
        columns = (found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy_px.tolist())
        return [
            {
                "label": self._predictor.settings.class_names[label],
                "label_id": label,
                "score": score,
                "box": box,
            }
            for label, score, box in zip(*columns, strict=True)
            if score >= least[label]
        ]


def _flat(cells: pd.Series) -> Iterable[object]:
    """Return the images of all rows: MLflow puts a dictionary's list of strings into a single row."""
    only = cells.iloc[0] if len(cells) == 1 else None
    return only if isinstance(only, list) and all(isinstance(each, str) for each in only) else cells


def _pixels(value: object, name: str, exif: ExifRule) -> Tensor:
    """Return an image of a request as uint8 [3, H, W].

    Raises:
        UnreadableImageError: with `name` and the reason.
    """
    if isinstance(value, os.PathLike):
        return _read(Path(value), name, exif)
    if isinstance(value, str):
        if _is_file(value):
            return _read(Path(value), name, exif)
        value = _decoded(value, name)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_content(np.frombuffer(bytearray(value), dtype=np.uint8), name, exif)
    if isinstance(value, list):
        value = _array(value)
    try:
        pixels = pixels_of(value, exif)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{name}: {error}") from error
    if pixels is None:
        kind = type(value).__name__
        if isinstance(value, np.ndarray | Tensor):
            kind = f"{kind} {value.dtype} {list(value.shape)}"
        raise UnreadableImageError(f"{name}: {kind} is no image; give {_FORMS}")
    return pixels


def _read(path: Path, name: str, exif: ExifRule) -> Tensor:
    try:
        return decode_rgb(path, exif)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{name}: {error}") from None


def _is_file(text: str) -> bool:
    """Return whether a string is the path of a file that may be read; never in a scoring server."""
    if os.environ.get(_SERVER_VARIABLE, "").lower() == "true" or len(text) > _LONGEST_PATH:
        return False
    with suppress(OSError, ValueError):
        return Path(text).is_file()
    return False


def _decoded(text: str, name: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(";base64,")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UnreadableImageError(
            f"{name}: neither base64 nor, outside a scoring server, the path of a file"
        ) from None


def _array(numbers: list[object]) -> object:
    """Return nested lists [H][W][3 or 4] of whole numbers from 0 to 255 as uint8, else the list itself.

    Two levels would be ambiguous: MLflow makes a row of each line of a single array.
    """
    try:
        array = np.asarray(numbers)
    except ValueError:  # rows of different lengths
        return numbers
    is_image = array.ndim == 3 and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255
    return array.astype(np.uint8) if is_image else numbers
