"""YOLO's label files: a line for each object, its class and its box or polygon in fractions of the image."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from detr_dist.data.columns import Faults
from detr_dist.text import value_of

RULES = {
    "malformed_label": ("label", "that cannot be read; each line is a class and its box: class x y w h"),
    "unknown_class": ("label", "of a class that 'names' does not list; correct the number or add the name"),
    "malformed_box": ("box", "not of finite numbers; x, y, w and h are fractions of the image"),
    "box_in_pixels": ("box", "far outside the image; x, y, w and h must be fractions of it, not pixels"),
    "negative_box": ("box", "of negative width or height; boxes are x y w h, with x and y of the centre"),
}

_FAR_OUTSIDE = 1.0
"""How far outside, in fractions of the image, a box cannot reach by mistake: its numbers are in pixels."""


@dataclass(slots=True)
class Labels:
    """The boxes of all label files, in columns and in the order of reading."""

    images: list[int] = field(default_factory=list)  # row of the image
    lines: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)  # xyxy in fractions


class LabelReader:
    """Reads label files, and collects the faults of their lines."""

    def __init__(self, names: Mapping[int, str], faults: Faults) -> None:
        self._numbers = {str(number): number for number in names}
        self._faults = faults
        self.labels = Labels()

    def read(self, image: int, path: Path, shown: str) -> None:
        """Read the label file of the image in row `image`; messages call the file by the text `shown`."""
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text in UTF-8"
            self._faults.add("malformed_label", examples=[f"{shown}: {reason}"])
            return
        labels = self.labels
        for line, text in enumerate(lines, start=1):
            words = text.split()
            if not words:
                continue
            try:
                number, corners = self._parse(words)
            except _WrongLineError as error:
                self._faults.add(error.kind, examples=[f"{shown}:{line}: {error}"])
                continue
            labels.images.append(image)
            labels.lines.append(line)
            labels.classes.append(number)
            labels.corners.append(corners)

    def _parse(self, words: list[str]) -> tuple[int, tuple[float, float, float, float]]:
        """Return the class of a line and its box, or that around its polygon.

        Raises:
            _WrongLineError: with the kind of fault.
        """
        if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
            raise _WrongLineError(
                "malformed_label",
                f"{len(words)} numbers; five are expected, or a class and the corners of a polygon (rotated "
                "boxes and keypoints are not read)",
            )
        number = self._numbers.get(words[0])
        if number is None:
            number = self._unusual_number(words[0])
        numbers = [_number(word) for word in words[1:]]
        if not all(map(isfinite, numbers)):
            raise _WrongLineError("malformed_box", " ".join(words[1:5]))
        if len(numbers) == 4:
            x, y, width, height = numbers
            if width < 0 or height < 0:
                raise _WrongLineError("negative_box", " ".join(words[1:]))
            corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        else:
            corners = (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
        if min(corners) < -_FAR_OUTSIDE or max(corners) >= 1 + _FAR_OUTSIDE:  # keypoints have 2s
            raise _WrongLineError("box_in_pixels", " ".join(words[1:5]))
        return number, corners

    def _unusual_number(self, word: str) -> int:
        """Return the class of a number such as `1.0`, which some exporters write."""
        value = _number(word)
        number = self._numbers.get(str(int(value))) if isfinite(value) and value == int(value) else None
        if number is None:
            numbers = sorted(self._numbers.values())
            without_gaps = numbers[-1] - numbers[0] == len(numbers) - 1
            known = f"{numbers[0]} to {numbers[-1]}" if without_gaps else ", ".join(map(str, numbers))
            raise _WrongLineError("unknown_class", f"class {value_of(word)}, but 'names' has {known}")
        return number


class _WrongLineError(Exception):
    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise _WrongLineError("malformed_label", f"{value_of(word)} is not a number") from None
