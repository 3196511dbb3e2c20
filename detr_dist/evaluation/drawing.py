"""Boxes with captions drawn into images, and names cut to what the font can show."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = "DejaVu Sans"
"""A font that comes with matplotlib, so that text looks the same everywhere."""
MAX_CHARACTERS = 24
"""Characters of a name in a plot or image."""
LIGHTNESS = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the lightness of a colour."""
MIN_FONT_PX = 10
MIN_BOX_PX = 6
"""Minimum side of a drawn box, in pixels; smaller boxes are drawn larger, so that they are visible."""

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom pixel, all inclusive."""


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont:
    """Load the font in a size."""
    return ImageFont.truetype(_font_path(), size_px)


@cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font  # slow to import, and needed only for drawing

    return frozenset(FT2Font(_font_path()).get_charmap())


def _font_path() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def drawable(name: str, otherwise: str = "?", *, limit: int = MAX_CHARACTERS) -> str:
    """Return the characters of a name that the font has, shortened in the middle; `otherwise` for none."""
    letters = _letters()
    shown = "".join(letter for letter in name if letter.isprintable() and ord(letter) in letters).strip()
    if len(shown) > limit:
        shown = shown[: limit - limit // 2 - 1] + "…" + shown[len(shown) - limit // 2 :]
    return shown or otherwise


def class_label(index: int, name: str) -> str:
    """Return the label of a class in a plot or image."""
    return drawable(name, f"class {index}")


def class_colour(index: int) -> Colour:
    """Return the fixed colour of a class in images; colours repeat after some hundred classes."""
    colours = _colours()
    return colours[index % len(colours)]


@cache
def _colours() -> list[Colour]:
    """Return colours, each as far from all before it as possible, without greys and extremes."""
    levels = np.arange(0, 256, 51)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = cube @ LIGHTNESS
    cube = cube[(np.ptp(cube, axis=1) >= 102) & (lightness > 50) & (lightness < 230)]
    weighted = cube * LIGHTNESS**0.5
    order = [int(np.argmax(cube @ (1, -1, -1)))]  # red
    distance = np.full(len(cube), np.inf)
    for _ in range(len(cube) - 1):
        distance = np.minimum(distance, np.linalg.norm(weighted - weighted[order[-1]], axis=1))
        order.append(int(distance.argmax()))
    return [(int(red), int(green), int(blue)) for red, green, blue in cube[order]]


@dataclass(frozen=True)
class Mark:
    """A box to draw."""

    box_xyxy_px: tuple[float, float, float, float]
    colour: Colour
    caption: str = ""
    dashed: bool = False
    is_thin: bool = False


def draw_marks(image: Image.Image, marks: Sequence[Mark]) -> None:
    """Draw boxes and captions into the RGB image, with lines and letters in proportion to it.

    The first mark is on top. Captions neither leave the image nor overlap; if two compete for room, that of
    the earlier mark is written.
    """
    unit = (image.width * image.height) ** 0.5
    thick, size_px = max(2, round(unit / 300)), max(MIN_FONT_PX, round(unit / 42))
    widths = [(thick + 1) // 2 if mark.is_thin else thick for mark in marks]
    frames = [_frame(mark, image, width) for mark, width in zip(marks, widths, strict=True)]
    for mark, frame, width in reversed(list(zip(marks, frames, widths, strict=True))):
        if mark.dashed:
            _draw_dashed(image, frame, width, mark.colour)
        else:
            ImageDraw.Draw(image).rectangle(frame, outline=mark.colour, width=width)
    taken: list[Rectangle] = []
    for mark, frame, width in zip(marks, frames, widths, strict=True):
        if mark.caption:
            _write_caption(image, mark, frame, width, size_px=size_px, taken=taken)


def _frame(mark: Mark, image: Image.Image, width: int) -> Rectangle:
    """Return the outermost pixels of the lines around the box, limited to the image."""
    low, high = np.array(mark.box_xyxy_px, dtype=np.float64).reshape(2, 2)
    extents = np.array(image.size)
    missing = (MIN_BOX_PX - (high - low)).clip(min=0) / 2
    first = np.rint(low - missing).astype(int) - width
    first = first.clip(0, (extents - MIN_BOX_PX).clip(min=0))
    last = np.rint(high + missing).astype(int) - 1 + width
    last = np.maximum(np.minimum(last, extents - 1), np.minimum(first + MIN_BOX_PX, extents) - 1)
    left, top, right, bottom = np.concatenate([first, last]).tolist()
    return left, top, right, bottom


def _draw_dashed(image: Image.Image, frame: Rectangle, width: int, colour: Colour) -> None:
    """Draw a frame in dashes of three line widths with gaps of two."""
    left, top, right, bottom = frame
    lines = np.ones((bottom - top + 1, right - left + 1), dtype=np.bool_)
    lines[width:-width, width:-width] = False
    along = np.add.outer(*(np.arange(extent) for extent in lines.shape))
    image.paste(colour, (left, top), Image.fromarray(lines & (along % (5 * width) < 3 * width)))


def _write_caption(
    image: Image.Image, mark: Mark, frame: Rectangle, width: int, *, size_px: int, taken: list[Rectangle]
) -> None:
    """Write the caption above the box, else under it, else inside it, wherever no other caption is."""
    letters, margin = font(size_px), max(1, size_px // 6)
    height = sum(letters.getmetrics())
    text = drawable(mark.caption, limit=len(mark.caption))
    while letters.getlength(text) > image.width - 2 * margin and len(text) > 1:
        text = drawable(text, limit=len(text) - 1)
    extent = int(np.ceil(letters.getlength(text))) + 2 * margin
    if extent > image.width or height > image.height:
        return
    left = min(max(frame[0], 0), image.width - extent)
    for top in (frame[1] - height, frame[3] + 1, frame[1] + width, frame[3] - width - height):
        place = (left, top, left + extent - 1, top + height - 1)
        if top >= 0 and top + height <= image.height and not any(_overlap(place, other) for other in taken):
            taken.append(place)
            draw = ImageDraw.Draw(image)
            draw.rectangle(place, fill=mark.colour)
            is_light = np.dot(mark.colour, LIGHTNESS) > 140
            draw.text((left + margin, top), text, fill="black" if is_light else "white", font=letters)
            return


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]
