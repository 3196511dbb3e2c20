"""The font of all pictures, and names cut to what it can show in the room there is."""

from functools import cache
from pathlib import Path

from PIL import ImageFont

FONT = "DejaVu Sans"
"""Comes with matplotlib, so it looks the same everywhere."""
MOST_CHARACTERS = 24
"""Of a name in a picture."""


def drawable(name: str, otherwise: str = "?", *, most: int = MOST_CHARACTERS) -> str:
    """The name as far as the font can show it, shortened in the middle; `otherwise` if nothing is left."""
    letters = _letters()
    shown = "".join(letter for letter in name if letter.isprintable() and ord(letter) in letters).strip()
    if len(shown) > most:
        shown = shown[: most - most // 2 - 1] + "…" + shown[len(shown) - most // 2 :]
    return shown or otherwise


def class_label(index: int, name: str) -> str:
    """What stands for a class in a picture."""
    return drawable(name, f"class {index}")


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_path(), size_px)


@cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font  # what draws nothing begins without matplotlib

    return frozenset(FT2Font(_font_path()).get_charmap())


def _font_path() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
