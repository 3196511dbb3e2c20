"""The empty pitch of a generated match scene: the camera, the ground and its markings, the light.

Everything is drawn `SUPERSAMPLING` times larger than it is stored. Names in `_px` are in stored pixels,
names in `_sp` in the larger ones, names in `_m` in metres on the pitch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 192, 160
SUPERSAMPLING = 4  # a power of two, so that box corners are exact binary fractions of a pixel
FOCAL_PX = 230.0  # a horizontal field of view of 45 degrees

Colour = tuple[int, int, int]
Point = tuple[float, float]
Floats = npt.NDArray[np.floating[Any]]

CHALK: Colour = (232, 236, 226)
BRIGHT: tuple[Colour, ...] = (
    (205, 30, 40), (30, 60, 170), (240, 240, 240), (245, 205, 40), (25, 25, 30), (120, 190, 235),
    (235, 110, 25), (110, 35, 130), (120, 20, 45), (240, 120, 170), (20, 150, 160), (150, 150, 155),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Camera:
    """Flat ground seen from `height_m` above it; it would end at the row `horizon_px`, above the picture."""

    horizon_px: float
    height_m: float
    target_m: Point
    heading: float

    def px_per_m(self, row_px: Any) -> Any:
        """Scale of what stands on the ground at a row (a number or an array of them)."""
        return (row_px - self.horizon_px) / self.height_m

    @property
    def target_depth_m(self) -> float:
        """Distance along the ground to `target_m`, which is in the middle of the picture."""
        return FOCAL_PX / float(self.px_per_m(HEIGHT / 2))

    def to_picture(self, points_m: Floats) -> Floats:
        """Column and row [..., 2] of pitch points [..., 2]; NaN for what is too near to be in the picture."""
        dx, dy = points_m[..., 0] - self.target_m[0], points_m[..., 1] - self.target_m[1]
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        depth_m = self.target_depth_m - dx * sin + dy * cos
        scale = FOCAL_PX / np.where(depth_m > 2, depth_m, np.nan)
        column = WIDTH / 2 + (dx * cos + dy * sin) * scale
        return np.stack([column, self.horizon_px + self.height_m * scale], axis=-1)

    def to_pitch(self) -> tuple[Floats, Floats]:
        """Pitch coordinates x, y [H, W] of every pixel."""
        scale = self.px_per_m(np.arange(HEIGHT)[:, None] + 0.5)
        right_m = (np.arange(WIDTH) + 0.5 - WIDTH / 2) / scale
        ahead_m = FOCAL_PX / scale - self.target_depth_m
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        x_m = self.target_m[0] + right_m * cos - ahead_m * sin
        return x_m, self.target_m[1] + right_m * sin + ahead_m * cos


def pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    """One of the colours, each as likely."""
    return colours[int(rng.integers(len(colours)))]


def draw_grass(rng: np.random.Generator, camera: Camera) -> Image.Image:
    """The empty ground at full drawing size: mown stripes, worn patches, blades."""
    x_m, y_m = camera.to_pitch()
    stripes = np.clip(4 * np.sin(x_m * (math.pi / rng.uniform(2.5, 5.5))), -1, 1)
    if rng.random() < 0.3:
        stripes = (stripes + np.clip(4 * np.sin(y_m * (math.pi / 4)), -1, 1)) / 2
    patches = Image.fromarray(rng.normal(0, 0.05, (10, 12)).astype(np.float32))
    light = 1 + rng.uniform(0.03, 0.1) * stripes + 0.05 * _noise(rng)
    light += np.asarray(patches.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    green = np.array([rng.uniform(55, 100), rng.uniform(115, 150), rng.uniform(35, 65)])
    picture = _to_picture(light.astype(np.float32)[..., None] * green.astype(np.float32))
    return picture.resize((WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), Image.Resampling.NEAREST)


@cache
def _line_points_m() -> Floats:
    """Ends [N, 2, 2] of short straight pieces of all lines of a pitch of 105 by 68 metres."""
    turn = np.linspace(0, 2 * math.pi, 65)
    outlines = [[(52.5, 0.0), (52.5, 68.0)]]
    for x1, y0, y1 in ((105.0, 0.0, 68.0), (16.5, 13.84, 54.16), (5.5, 24.84, 43.16)):
        outlines.append([(0.0, y0), (x1, y0), (x1, y1), (0.0, y1), (0.0, y0)])
    pieces = []
    for outline in outlines:
        for start, end in zip(np.array(outline[:-1]), np.array(outline[1:]), strict=True):
            steps = np.linspace(0, 1, int(np.abs(end - start).sum()) + 2)[:, None]
            pieces.append(start + (end - start) * steps)
    for x, y, radius, least_x in ((52.5, 34, 9.15, 0), (11, 34, 9.15, 16.5), (0, 0, 1, 0), (0, 68, 1, 0)):
        circle = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=-1)
        inside = (circle[:, 0] >= least_x) & (circle[:, 1] >= 0) & (circle[:, 1] <= 68)
        pieces.append(np.where(inside[:, None], circle, np.nan))
    return np.concatenate([np.stack([piece[:-1], piece[1:]], axis=1) for piece in pieces])


def draw_markings(rng: np.random.Generator, canvas: Image.Image, camera: Camera) -> None:
    """Pitch lines and spots, and flat things of a ball's size that are no ball."""
    draw = ImageDraw.Draw(canvas)
    ends_px = camera.to_picture(_line_points_m())
    inside = np.all((ends_px > -40) & (ends_px < (WIDTH + 40, HEIGHT + 40)), axis=(1, 2))
    ends_px = ends_px[inside]
    widths_px = camera.px_per_m(ends_px[..., 1].mean(axis=1)) * rng.uniform(0.12, 0.17)
    for ends, width in zip(ends_px * SUPERSAMPLING, widths_px * SUPERSAMPLING, strict=True):
        draw.line(ends.ravel().tolist(), fill=CHALK, width=max(2, round(width)))
    spots = [(*camera.to_picture(np.array(spot_m)), CHALK) for spot_m in ((11.0, 34.0), (52.5, 34.0))]
    for _ in range(rng.integers(0, 4)):
        colour = CHALK if rng.random() < 0.6 else pick(rng, BRIGHT)
        spots.append((rng.uniform(0, WIDTH), rng.uniform(40, HEIGHT), colour))
    for column, row, colour in spots:
        if not math.isnan(column):
            wide = camera.px_per_m(row) * rng.uniform(0.12, 0.22) * SUPERSAMPLING
            x, y, high = column * SUPERSAMPLING, row * SUPERSAMPLING, wide * rng.uniform(0.3, 0.5)
            draw.ellipse((x - wide, y - high, x + wide, y + high), fill=colour)


def draw_stand(rng: np.random.Generator, canvas: Image.Image, rows_px: int) -> None:
    """Spectators and advertising boards along the top of the picture."""
    people = rng.integers(25, 110, (rows_px // 2 + 1, WIDTH // 2, 3), dtype=np.uint8)
    crowd = people.repeat(2, axis=0)[:rows_px]
    board_px = min(rows_px, int(rng.integers(5, 9)))
    column = 0
    while column < WIDTH // 2:
        end = column + int(rng.integers(8, 30))
        crowd[-board_px:, column:end] = pick(rng, BRIGHT)
        crowd[-board_px + 1 : -1 : 2, column + 2 : end - 2 : 3] = pick(rng, BRIGHT)
        column = end
    crowd[-1] //= 3
    size = (WIDTH * SUPERSAMPLING, rows_px * SUPERSAMPLING)
    canvas.paste(Image.fromarray(crowd).resize(size, Image.Resampling.NEAREST), (0, 0))


def expose(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """The picture at its stored size, lit unevenly, with the noise of a sensor."""
    pixels = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    x, y = np.linspace(-1, 1, WIDTH)[None, :], np.linspace(-1, 1, HEIGHT)[:, None]
    light = (
        rng.uniform(0.8, 1.15)
        + rng.uniform(-0.1, 0.1) * x
        + rng.uniform(-0.1, 0.1) * y
        - 0.06 * (x * x + y * y)
    )
    if rng.random() < 0.25:  # the shadow of a stand
        slope, offset = rng.uniform(-1, 1), rng.uniform(-0.6, 0.6)
        light *= np.where(y < slope * x + offset, rng.uniform(0.55, 0.75), 1)
    pixels = pixels * light.astype(np.float32)[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    return _to_picture(pixels + np.float32(rng.uniform(1, 5)) * _noise(rng)[..., None])


def _noise(rng: np.random.Generator) -> Floats:
    return rng.standard_normal((HEIGHT, WIDTH), dtype=np.float32)


def _to_picture(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
