"""Drawing of the parts of a match scene: the camera, the pitch and its light, players and balls.

Everything is drawn `SUPERSAMPLING` times larger than it is stored. Names in `_px` are in stored pixels, names
in `_sp` in the larger ones, names in `_m` in metres on the pitch. Players and balls are RGBA images cropped
to the object, opaque where it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from detr_dist.data.motion_blur import blur_along_line

WIDTH, HEIGHT = 192, 160
SUPERSAMPLING = 4  # a power of two, so that box corners are exact binary fractions of a pixel
FOCAL_WIDTHS = 230.0 / WIDTH  # in widths of the image: a horizontal field of view of 45 degrees
OPAQUE = 128  # what has less is not part of the object, such as the ends of a blurred ball

Colour = tuple[int, int, int]
Point = tuple[float, float]
Floats = npt.NDArray[np.floating[Any]]

CHALK: Colour = (232, 236, 226)
BRIGHT: tuple[Colour, ...] = (
    (205, 30, 40), (30, 60, 170), (240, 240, 240), (245, 205, 40), (25, 25, 30), (120, 190, 235),
    (235, 110, 25), (110, 35, 130), (120, 20, 45), (240, 120, 170), (20, 150, 160), (150, 150, 155),
)  # fmt: skip
SHORTS: tuple[Colour, ...] = ((238, 238, 238), (28, 28, 34), (35, 45, 110))
SKINS: tuple[Colour, ...] = ((236, 196, 165), (214, 162, 124), (170, 116, 78), (112, 72, 48), (78, 50, 36))
HAIRS: tuple[Colour, ...] = ((35, 25, 20), (80, 52, 30), (170, 130, 70), (20, 20, 22))
BOOTS: tuple[Colour, ...] = ((20, 20, 20), (235, 235, 235), (230, 60, 40), (40, 200, 220))
# stands, walks, runs, kicks, slides: stride, bend of the rear knee, lean of the body, in radians
POSES = ((0.12, 0.1, 0.0), (0.35, 0.4, 0.06), (0.75, 1.2, 0.2), (1.15, 0.4, -0.2), (0.6, 0.5, -1.1))
POSE_SHARES = (0.25, 0.28, 0.3, 0.12, 0.05)
FAR_SIDE = 0.75  # brightness of the limbs on the far side of the body


@dataclass(frozen=True, slots=True)
class Camera:
    """A view of flat ground from `height_m` above it; the horizon is at row `horizon_px`, above the image."""

    horizon_px: float
    height_m: float
    target_m: Point
    heading: float
    size_px: tuple[int, int] = (WIDTH, HEIGHT)  # of the image

    def px_per_m(self, row_px: Any) -> Any:
        """Return the scale of objects that stand on the ground at a row (a number or an array of them)."""
        return (row_px - self.horizon_px) / self.height_m

    @property
    def target_depth_m(self) -> float:
        """Return the distance along the ground to `target_m`, which is in the middle of the image."""
        return self.focal_px / float(self.px_per_m(self.size_px[1] / 2))

    @property
    def focal_px(self) -> float:
        """Return the focal length."""
        return FOCAL_WIDTHS * self.size_px[0]

    def to_image(self, points_m: Floats) -> Floats:
        """Return column and row [..., 2] of pitch points [..., 2]; NaN for what is too near to be visible."""
        dx, dy = points_m[..., 0] - self.target_m[0], points_m[..., 1] - self.target_m[1]
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        depth_m = self.target_depth_m - dx * sin + dy * cos
        scale = self.focal_px / np.where(depth_m > 2, depth_m, np.nan)
        column = self.size_px[0] / 2 + (dx * cos + dy * sin) * scale
        return np.stack([column, self.horizon_px + self.height_m * scale], axis=-1)

    def to_pitch(self) -> tuple[Floats, Floats]:
        """Return pitch coordinates x, y [H, W] of every pixel."""
        width, height = self.size_px
        scale = self.px_per_m(np.arange(height)[:, None] + 0.5)
        right_m = (np.arange(width) + 0.5 - width / 2) / scale
        ahead_m = self.focal_px / scale - self.target_depth_m
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        x_m = self.target_m[0] + right_m * cos - ahead_m * sin
        return x_m, self.target_m[1] + right_m * sin + ahead_m * cos


def pick(rng: np.random.Generator, colours: Sequence[Colour]) -> Colour:
    """Return one of the colours, all equally likely."""
    return colours[int(rng.integers(len(colours)))]


def draw_grass(rng: np.random.Generator, camera: Camera) -> Image.Image:
    """Draw the empty ground at full drawing size: mown stripes, worn patches, blades."""
    x_m, y_m = camera.to_pitch()
    stripes = np.clip(4 * np.sin(x_m * (math.pi / rng.uniform(2.5, 5.5))), -1, 1)
    if rng.random() < 0.3:
        stripes = (stripes + np.clip(4 * np.sin(y_m * (math.pi / 4)), -1, 1)) / 2
    patches = Image.fromarray(rng.normal(0, 0.05, (10, 12)).astype(np.float32))
    light = 1 + rng.uniform(0.03, 0.1) * stripes + 0.05 * _noise(rng, camera.size_px)
    light += np.asarray(patches.resize(camera.size_px, Image.Resampling.BICUBIC))
    green = np.array([rng.uniform(55, 100), rng.uniform(115, 150), rng.uniform(35, 65)])
    image = _to_image(light.astype(np.float32)[..., None] * green.astype(np.float32))
    return image.resize(_enlarged(camera.size_px), Image.Resampling.NEAREST)


@cache
def _line_points_m() -> Floats:
    """Return the ends [N, 2, 2] of short straight pieces of all lines of a pitch of 105 by 68 metres."""
    turn = np.linspace(0, 2 * math.pi, 65)
    outlines = [[(52.5, 0.0), (52.5, 68.0)]]
    for x1, y0, y1 in ((105.0, 0.0, 68.0), (16.5, 13.84, 54.16), (5.5, 24.84, 43.16)):
        outlines.append([(0.0, y0), (x1, y0), (x1, y1), (0.0, y1), (0.0, y0)])
    pieces = []
    for outline in outlines:
        for start, end in pairwise(np.array(outline)):
            steps = np.linspace(0, 1, int(np.abs(end - start).sum()) + 2)[:, None]
            pieces.append(start + (end - start) * steps)
    for x, y, radius, least_x in ((52.5, 34, 9.15, 0), (11, 34, 9.15, 16.5), (0, 0, 1, 0), (0, 68, 1, 0)):
        circle = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=-1)
        inside = (circle[:, 0] >= least_x) & (circle[:, 1] >= 0) & (circle[:, 1] <= 68)
        pieces.append(np.where(inside[:, None], circle, np.nan))
    return np.concatenate([np.stack([piece[:-1], piece[1:]], axis=1) for piece in pieces])


def draw_markings(rng: np.random.Generator, canvas: Image.Image, camera: Camera) -> None:
    """Draw pitch lines and spots, and flat objects of a ball's size that are not balls."""
    draw = ImageDraw.Draw(canvas)
    ends_px, (width, height) = camera.to_image(_line_points_m()), camera.size_px
    beyond = 40 * height / HEIGHT
    inside = np.all((ends_px > -beyond) & (ends_px < (width + beyond, height + beyond)), axis=(1, 2))
    ends_px = ends_px[inside]
    widths_px = camera.px_per_m(ends_px[..., 1].mean(axis=1)) * rng.uniform(0.12, 0.17)
    for ends, wide in zip(ends_px * SUPERSAMPLING, widths_px * SUPERSAMPLING, strict=True):
        draw.line(ends.ravel().tolist(), fill=CHALK, width=max(2, round(wide)))
    spots = [(*camera.to_image(np.array(spot_m)), CHALK) for spot_m in ((11.0, 34.0), (52.5, 34.0))]
    for _ in range(rng.integers(0, 4)):
        colour = CHALK if rng.random() < 0.6 else pick(rng, BRIGHT)
        spots.append((rng.uniform(0, width), rng.uniform(beyond, height), colour))
    for column, row, colour in spots:
        if not math.isnan(column):
            wide = camera.px_per_m(row) * rng.uniform(0.12, 0.22) * SUPERSAMPLING
            x, y, high = column * SUPERSAMPLING, row * SUPERSAMPLING, wide * rng.uniform(0.3, 0.5)
            draw.ellipse((x - wide, y - high, x + wide, y + high), fill=colour)


def draw_stand(rng: np.random.Generator, canvas: Image.Image, rows_px: int, unit: float = 1.0) -> None:
    """Draw spectators and advertising boards along the top, `rows_px` times `unit` high."""
    wide = round(canvas.width / SUPERSAMPLING / unit)
    people = rng.integers(25, 110, (rows_px // 2 + 1, wide // 2, 3), dtype=np.uint8)
    crowd = people.repeat(2, axis=0)[:rows_px]
    board_px = min(rows_px, int(rng.integers(5, 9)))
    column = 0
    while column < wide // 2:
        end = column + int(rng.integers(8, 30))
        crowd[-board_px:, column:end] = pick(rng, BRIGHT)
        crowd[-board_px + 1 : -1 : 2, column + 2 : end - 2 : 3] = pick(rng, BRIGHT)
        column = end
    crowd[-1] //= 3
    size = canvas.width, round(rows_px * unit) * SUPERSAMPLING
    canvas.paste(Image.fromarray(crowd).resize(size, Image.Resampling.NEAREST), (0, 0))


def expose(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Return the image at its stored size, lit unevenly, with the noise of a sensor."""
    stored = canvas.reduce(SUPERSAMPLING)
    pixels = np.asarray(stored, dtype=np.float32)
    x, y = np.linspace(-1, 1, stored.width)[None, :], np.linspace(-1, 1, stored.height)[:, None]
    light = rng.uniform(0.8, 1.15) + rng.uniform(-0.1, 0.1) * x + rng.uniform(-0.1, 0.1) * y
    light -= 0.06 * (x * x + y * y)
    if rng.random() < 0.25:  # the shadow of a stand
        slope, offset = rng.uniform(-1, 1), rng.uniform(-0.6, 0.6)
        light *= np.where(y < slope * x + offset, rng.uniform(0.55, 0.75), 1)
    pixels = pixels * light.astype(np.float32)[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    return _to_image(pixels + np.float32(rng.uniform(1, 5)) * _noise(rng, stored.size)[..., None])


def pan(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    """Return the canvas blurred by up to 3.5 stored pixels, as by a camera that follows the play."""
    length = 2 * int(rng.integers(1, 7 * SUPERSAMPLING // 4)) + 1
    return Image.fromarray(blur_along_line(np.asarray(canvas), length, rng.normal(0, 0.2)))


def _noise(rng: np.random.Generator, size_px: tuple[int, int]) -> Floats:
    return rng.standard_normal(size_px[::-1], dtype=np.float32)


def _enlarged(size_px: tuple[int, int]) -> tuple[int, int]:
    return size_px[0] * SUPERSAMPLING, size_px[1] * SUPERSAMPLING


def _to_image(pixels: Floats) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


class Kit(NamedTuple):
    """The clothes of one side's players."""

    shirt: Colour
    stripe: Colour
    shorts: Colour
    socks: Colour


def choose_kits(rng: np.random.Generator) -> list[Kit]:
    """Choose three kits with shirts that differ: two teams, and one for goalkeepers and referees."""
    kits = []
    for index in rng.permutation(len(BRIGHT))[:3]:
        shirt = BRIGHT[index]
        shorts = shirt if rng.random() < 0.3 else pick(rng, SHORTS)
        stripe = pick(rng, BRIGHT) if rng.random() < 0.3 else shirt
        kits.append(Kit(shirt, stripe, shorts, shirt if rng.random() < 0.5 else shorts))
    return kits


class _Body:
    """A canvas for one player. Points on it: x ahead, y up, origin at the hip, in heights of the player."""

    def __init__(self, height: float, lean: float, facing: int) -> None:
        self.height, self.facing = height, facing
        self.cos, self.sin = math.cos(lean), math.sin(lean)
        self.image = Image.new("RGBA", (round(1.6 * height), round(1.6 * height)))
        self.draw = ImageDraw.Draw(self.image)

    def at(self, point: Point) -> Point:
        """Return the pixel of a point of the upright body after it has leaned."""
        x, y = point[0] * self.cos + point[1] * self.sin, point[1] * self.cos - point[0] * self.sin
        return (0.8 + x * self.facing) * self.height, (0.8 - y) * self.height

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        (x, y), r = self.at(centre), radius * self.height
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def limb(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """Draw a bar with round ends."""
        wide = max(1, round(width * self.height))
        self.draw.line((*self.at(start), *self.at(end)), fill=colour, width=wide)
        self.disc(start, width / 2, colour)
        self.disc(end, width / 2, colour)

    def shape(self, points: list[Point], colour: Colour) -> None:
        self.draw.polygon([self.at(point) for point in points], fill=colour)


def draw_player(rng: np.random.Generator, kit: Kit, height: float) -> Image.Image:
    """Draw a player who stands `height` pixels tall when upright; the lowest row is where the ground is."""
    pose = np.array(POSES[int(rng.choice(len(POSES), p=POSE_SHARES))]) * rng.uniform(0.6, 1.1, 3)
    stride, knee, lean = (float(angle) for angle in pose)
    body = _Body(height, lean, 1 if rng.random() < 0.5 else -1)
    turn = rng.uniform(0.2, 1)  # 0 is seen from the front or back, 1 from the side
    skin, boots, first = pick(rng, SKINS), pick(rng, BOOTS), 1 if rng.random() < 0.5 else -1
    hip, shoulder = 0.045 - 0.03 * turn, 0.12 - 0.045 * turn
    for side, shade in ((-1, FAR_SIDE), (1, 1.0)):
        swing = first * side * stride * (0.3 + 0.7 * turn)
        bent = swing - (knee if swing < 0 else 0.1 * knee) * (0.3 + 0.7 * turn)
        colours = (skin, kit.shorts, kit.socks, boots, kit.shirt)
        own_skin, shorts, socks, boot, shirt = (_shaded(colour, shade) for colour in colours)
        top = hip * side, 0.0
        bend = _reach(top, swing, 0.23)
        ankle = _reach(bend, bent, 0.22)
        body.limb(bend, ankle, 0.06, socks)
        body.limb(top, bend, 0.075, own_skin)
        body.limb(top, _reach(top, swing, 0.14), 0.105, shorts)
        body.limb(ankle, _reach(ankle, bent + 1.4, 0.06), 0.045, boot)
        if side == 1:
            _draw_torso(body, kit, hip, shoulder)
        upper = -0.8 * swing + side * rng.uniform(0, 0.4) * (1 - turn) + rng.uniform(-0.15, 0.15)
        top = shoulder * side, 0.28
        elbow = _reach(top, upper, 0.15)
        body.limb(elbow, _reach(elbow, upper + rng.uniform(0.1, 1.4), 0.14), 0.042, own_skin)
        body.limb(top, elbow, 0.05, own_skin)
        body.limb(top, _reach(top, upper, 0.1), 0.065, shirt)
    body.limb((0, 0.31), (0.005, 0.36), 0.055, _shaded(skin, FAR_SIDE))
    body.disc((0.005, 0.42), 0.07, pick(rng, HAIRS))
    body.disc((0.005 + 0.03 * turn, 0.405), 0.055, skin)
    return body.image.crop(body.image.getbbox())


def _shaded(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(value * factor) for value in colour)
    return red, green, blue


def _reach(start: Point, angle: float, length: float) -> Point:
    """Return where a bone ends that hangs from `start`, turned forward by `angle` from straight down."""
    return start[0] + length * math.sin(angle), start[1] - length * math.cos(angle)


def _draw_torso(body: _Body, kit: Kit, hip: float, shoulder: float) -> None:
    waist = hip + 0.04
    body.shape([(-waist, -0.04), (waist, -0.04), (waist, 0.06), (-waist, 0.06)], kit.shorts)
    body.shape([(-waist, 0.03), (waist, 0.03), (shoulder, 0.29), (-shoulder, 0.29)], kit.shirt)
    body.limb((-shoulder + 0.02, 0.285), (shoulder - 0.02, 0.285), 0.06, kit.shirt)
    if kit.stripe != kit.shirt:
        for x in (-0.55, 0, 0.55):
            body.shape([(x * waist - 0.012, 0.04), (x * waist + 0.012, 0.04), (x * shoulder + 0.014, 0.31),
                        (x * shoulder - 0.014, 0.31)], kit.stripe)  # fmt: skip


def draw_ball(rng: np.random.Generator, diameter: float) -> Image.Image:
    """Draw a white ball with dark patches, darker below."""
    size = round(diameter)
    ball = Image.new("RGB", (size, size), (248, 248, 246))
    draw, radius, turn = ImageDraw.Draw(ball), size / 2, rng.uniform(0, math.pi)
    off_x, off_y = rng.uniform(-0.3, 0.3, 2) * radius
    for index in range(6):
        distance, wide = (0.0, 0.36) if index == 0 else (0.85, 0.27)
        angle = turn + index * 2 * math.pi / 5
        x = radius + off_x + distance * radius * math.cos(angle)
        y = radius + off_y + distance * radius * math.sin(angle)
        draw.regular_polygon((x, y, wide * radius), 5, rotation=math.degrees(-angle), fill=(30, 30, 36))
    outline = Image.new("L", (size, size))
    ImageDraw.Draw(outline).ellipse((0, 0, size - 1, size - 1), fill=255)
    shade = Image.linear_gradient("L").resize((size, size)).point(lambda value: max(0, value - 110))
    ball.paste((70, 85, 70), mask=shade)
    ball.putalpha(outline)
    return ball


def blur_sprite(rng: np.random.Generator, sprite: Image.Image) -> Image.Image:
    """Return an object that moves by up to 0.6 of its width while it is exposed; its ends are translucent."""
    length = 2 * int(rng.integers(1, max(2, round(0.3 * sprite.width)))) + 1
    still = np.pad(np.asarray(sprite), ((length, length), (length, length), (0, 0)))
    still[..., :3] = still[..., :3] * (still[..., 3:] // 255)
    moving = blur_along_line(still, length, rng.uniform(0, math.pi)).astype(np.float32)
    moving[..., :3] *= 255 / np.maximum(moving[..., 3:], 1)
    blurred = Image.fromarray(np.rint(moving).clip(0, 255).astype(np.uint8))
    return blurred.crop(blurred.getchannel("A").getbbox())


def draw_mistakable(rng: np.random.Generator, diameter: float) -> Image.Image:
    """Draw what has the size of a ball and is none: a coloured disc, or a flat white one."""
    is_white = rng.random() < 0.5
    high = diameter * (rng.uniform(0.35, 0.6) if is_white else rng.uniform(0.7, 1.1))
    colour = CHALK if is_white else pick(rng, BRIGHT[:2] + BRIGHT[3:])
    size = max(2, round(diameter)), max(2, round(high))
    disc, outline = Image.new("RGB", size, colour), Image.new("L", size)
    ImageDraw.Draw(outline).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=255)
    disc.putalpha(outline)
    return disc
