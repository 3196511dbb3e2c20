"""Boxes with captions in a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detr_dist.evaluation.lettering import drawable, font

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom, all inside."""

LIGHTNESS = np.array([0.299, 0.587, 0.114])
"""How much the eye makes of red, green and blue."""
LEAST_FONT_PX = 10
LEAST_BOX_PX = 6
"""Of a drawn side: a smaller box is drawn larger, so that it is seen."""


def class_colour(index: int) -> Colour:
    """The colour of a class in a picture, always the same one; after some hundred classes they repeat."""
    colours = _colours()
    return colours[index % len(colours)]


@cache
def _colours() -> list[Colour]:
    """Each as far from all before it as any can be, to the eye; no greys, nothing very dark or light."""
    levels = np.arange(0, 256, 51)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = cube @ LIGHTNESS
    cube = cube[(np.ptp(cube, axis=1) >= 102) & (lightness > 50) & (lightness < 230)]
    seen = cube * LIGHTNESS**0.5
    order = [int(np.argmax(cube @ (1, -1, -1)))]  # red
    distance = np.full(len(cube), np.inf)
    for _ in range(len(cube) - 1):
        distance = np.minimum(distance, np.linalg.norm(seen - seen[order[-1]], axis=1))
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


def draw_boxes(
    image: Tensor, boxes_xyxy_px: Tensor, captions: Sequence[str], colours: Sequence[Colour]
) -> Tensor:
    """A copy of the picture, uint8 [3, H, W], with boxes [D, 4] drawn in it.

    Lines and letters are in proportion to the picture. Captions never reach outside it nor cover one another;
    where there is no room, that of the earlier box is written.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    corners = boxes_xyxy_px.double().tolist()
    marks = [
        Mark((left, top, right, bottom), colour, caption)
        for (left, top, right, bottom), caption, colour in zip(corners, captions, colours, strict=True)
    ]
    draw_marks(picture, marks)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def draw_marks(picture: Image.Image, marks: Sequence[Mark]) -> None:
    """Draws into the picture. The first mark lies on top, and its caption has the first choice of place."""
    unit = (picture.width * picture.height) ** 0.5
    thick, size_px = max(2, round(unit / 300)), max(LEAST_FONT_PX, round(unit / 42))
    draw = ImageDraw.Draw(picture)
    frames = [_frame(mark, picture, (thick + 1) // 2 if mark.is_thin else thick) for mark in marks]
    for mark, (frame, width) in reversed(list(zip(marks, frames, strict=True))):
        for line in _dashes(frame, width) if mark.dashed else _sides(frame, width):
            draw.rectangle(line, fill=mark.colour)
    taken: list[Rectangle] = []
    for mark, (frame, width) in zip(marks, frames, strict=True):
        if mark.caption:
            _write(draw, mark, frame, width, size_px=size_px, taken=taken)


def _frame(mark: Mark, picture: Image.Image, width: int) -> tuple[Rectangle, int]:
    """Where the lines run: around the box, as far as the picture reaches. With their width."""
    left, right = _grown(mark.box_xyxy_px[0], mark.box_xyxy_px[2], picture.width, width)
    top, bottom = _grown(mark.box_xyxy_px[1], mark.box_xyxy_px[3], picture.height, width)
    return (left, top, right, bottom), width


def _grown(low: float, high: float, extent: int, width: int) -> tuple[int, int]:
    """The outermost pixels of a box's lines along one axis."""
    missing = max(LEAST_BOX_PX - (high - low), 0) / 2
    first, last = round(low - missing) - width, round(high + missing) - 1 + width
    first = min(max(first, 0), max(extent - LEAST_BOX_PX, 0))
    return first, max(min(last, extent - 1), min(first + LEAST_BOX_PX, extent) - 1)


def _sides(frame: Rectangle, width: int) -> list[Rectangle]:
    left, top, right, bottom = frame
    inner = width - 1
    return [
        (left, top, right, min(top + inner, bottom)),
        (left, max(bottom - inner, top), right, bottom),
        (left, top, min(left + inner, right), bottom),
        (max(right - inner, left), top, right, bottom),
    ]


def _dashes(frame: Rectangle, width: int) -> list[Rectangle]:
    """Dashes of three widths and gaps of two, from each corner on."""
    dashes = []
    for left, top, right, bottom in _sides(frame, width):
        if right - left > bottom - top:
            for start in range(left, right + 1, 5 * width):
                dashes.append((start, top, min(start + 3 * width - 1, right), bottom))
        else:
            for start in range(top, bottom + 1, 5 * width):
                dashes.append((left, start, right, min(start + 3 * width - 1, bottom)))
    return dashes


def _write(
    draw: ImageDraw.ImageDraw,
    mark: Mark,
    frame: Rectangle,
    width: int,
    *,
    size_px: int,
    taken: list[Rectangle],
) -> None:
    """The caption above the box, else under it, else inside it, where no other one is yet."""
    picture_width, picture_height = draw.im.size
    letters, margin = font(size_px), max(1, size_px // 6)
    ascent, descent = letters.getmetrics()
    height = ascent + descent
    text = drawable(mark.caption, most=len(mark.caption))
    while letters.getlength(text) > picture_width - 2 * margin and len(text) > 1:
        text = drawable(text, most=len(text) - 1)
    extent = int(np.ceil(letters.getlength(text))) + 2 * margin
    if extent > picture_width or height > picture_height:
        return
    left = min(max(frame[0], 0), picture_width - extent)
    for top in (frame[1] - height, frame[3] + 1, frame[1] + width, frame[3] - width - height):
        place = (left, top, left + extent - 1, top + height - 1)
        if top >= 0 and top + height <= picture_height and not any(_meet(place, other) for other in taken):
            taken.append(place)
            draw.rectangle(place, fill=mark.colour)
            draw.text((left + margin, top), text, fill=_readable_on(mark.colour), font=letters)
            return


def _meet(a: Rectangle, b: Rectangle) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _readable_on(colour: Colour) -> Colour:
    return (0, 0, 0) if np.dot(colour, LIGHTNESS) > 140 else (255, 255, 255)
