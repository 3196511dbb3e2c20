"""Players and balls of generated match scenes: RGBA pictures cropped to the object, opaque where it is."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from detr_dist.data.synthetic_pitch import BRIGHT, Colour, Point, pick

SHORTS: tuple[Colour, ...] = ((238, 238, 238), (28, 28, 34), (35, 45, 110))
SKINS: tuple[Colour, ...] = ((236, 196, 165), (214, 162, 124), (170, 116, 78), (112, 72, 48), (78, 50, 36))
HAIRS: tuple[Colour, ...] = ((35, 25, 20), (80, 52, 30), (170, 130, 70), (20, 20, 22))
BOOTS: tuple[Colour, ...] = ((20, 20, 20), (235, 235, 235), (230, 60, 40), (40, 200, 220))
# stands, walks, runs, kicks, slides: stride, bend of the rear knee, lean of the body, in radians
POSES = ((0.12, 0.1, 0.0), (0.35, 0.4, 0.06), (0.75, 1.2, 0.2), (1.15, 0.4, -0.2), (0.6, 0.5, -1.1))
POSE_SHARES = (0.25, 0.28, 0.3, 0.12, 0.05)
FAR_SIDE = 0.75  # brightness of the limbs on the far side of the body


@dataclass(frozen=True, slots=True)
class Kit:
    """What the players of one side wear."""

    shirt: Colour
    stripe: Colour
    shorts: Colour
    socks: Colour


def choose_kits(rng: np.random.Generator) -> list[Kit]:
    """Three kits with shirts that differ: two teams, and one for goalkeepers and referees."""
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
        """Pixel of a point of the upright body after it has leaned."""
        x, y = point[0] * self.cos + point[1] * self.sin, point[1] * self.cos - point[0] * self.sin
        return (0.8 + x * self.facing) * self.height, (0.8 - y) * self.height

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        (x, y), r = self.at(centre), radius * self.height
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def limb(self, start: Point, end: Point, width: float, colour: Colour) -> None:
        """A bar with round ends."""
        self.draw.line(
            (*self.at(start), *self.at(end)), fill=colour, width=max(1, round(width * self.height))
        )
        self.disc(start, width / 2, colour)
        self.disc(end, width / 2, colour)

    def shape(self, points: list[Point], colour: Colour) -> None:
        self.draw.polygon([self.at(point) for point in points], fill=colour)


def draw_player(rng: np.random.Generator, kit: Kit, height: float) -> Image.Image:
    """A player who stands `height` pixels tall when upright; the lowest row is where the ground is."""
    pose = np.array(POSES[int(rng.choice(len(POSES), p=POSE_SHARES))]) * rng.uniform(0.6, 1.1, 3)
    stride, knee, lean = (float(angle) for angle in pose)
    body = _Body(height, lean, 1 if rng.random() < 0.5 else -1)
    turn = rng.uniform(0.2, 1)  # 0 is seen from the front or back, 1 from the side
    skin, boots, first = pick(rng, SKINS), pick(rng, BOOTS), 1 if rng.random() < 0.5 else -1
    hip, shoulder = 0.045 - 0.03 * turn, 0.12 - 0.045 * turn
    for side, shade in ((-1, FAR_SIDE), (1, 1.0)):
        swing = first * side * stride * (0.3 + 0.7 * turn)
        bend = (knee if swing < 0 else 0.1 * knee) * (0.3 + 0.7 * turn)
        colours = [_shaded(colour, shade) for colour in (skin, kit.shorts, kit.socks, boots)]
        _draw_leg(body, hip * side, (swing, swing - bend), colours)
        if side == 1:
            _draw_torso(body, kit, hip, shoulder)
        upper = -0.8 * swing + side * rng.uniform(0, 0.4) * (1 - turn) + rng.uniform(-0.15, 0.15)
        _draw_arm(
            body,
            shoulder * side,
            (upper, upper + rng.uniform(0.1, 1.4)),
            [colours[0], _shaded(kit.shirt, shade)],
        )
    body.limb((0, 0.31), (0.005, 0.36), 0.055, _shaded(skin, FAR_SIDE))
    body.disc((0.005, 0.42), 0.07, pick(rng, HAIRS))
    body.disc((0.005 + 0.03 * turn, 0.405), 0.055, skin)
    return body.image.crop(body.image.getbbox())


def _shaded(colour: Colour, factor: float) -> Colour:
    return int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor)


def _reach(start: Point, angle: float, length: float) -> Point:
    """Where a bone ends that hangs from `start`, turned forward by `angle` from straight down."""
    return start[0] + length * math.sin(angle), start[1] - length * math.cos(angle)


def _draw_leg(body: _Body, hip: float, angles: tuple[float, float], colours: list[Colour]) -> None:
    skin, shorts, socks, boots = colours
    knee = _reach((hip, 0), angles[0], 0.23)
    ankle = _reach(knee, angles[1], 0.22)
    body.limb(knee, ankle, 0.06, socks)
    body.limb((hip, 0), knee, 0.075, skin)
    body.limb((hip, 0), _reach((hip, 0), angles[0], 0.14), 0.105, shorts)
    body.limb(ankle, _reach(ankle, angles[1] + 1.4, 0.06), 0.045, boots)


def _draw_torso(body: _Body, kit: Kit, hip: float, shoulder: float) -> None:
    waist = hip + 0.04
    body.shape([(-waist, -0.04), (waist, -0.04), (waist, 0.06), (-waist, 0.06)], kit.shorts)
    body.shape([(-waist, 0.03), (waist, 0.03), (shoulder, 0.29), (-shoulder, 0.29)], kit.shirt)
    body.limb((-shoulder + 0.02, 0.285), (shoulder - 0.02, 0.285), 0.06, kit.shirt)
    if kit.stripe != kit.shirt:
        for x in (-0.55, 0, 0.55):
            body.shape([(x * waist - 0.012, 0.04), (x * waist + 0.012, 0.04), (x * shoulder + 0.014, 0.31),
                        (x * shoulder - 0.014, 0.31)], kit.stripe)  # fmt: skip


def _draw_arm(body: _Body, shoulder: float, angles: tuple[float, float], colours: list[Colour]) -> None:
    start = (shoulder, 0.28)
    elbow = _reach(start, angles[0], 0.15)
    body.limb(elbow, _reach(elbow, angles[1], 0.14), 0.042, colours[0])
    body.limb(start, elbow, 0.05, colours[0])
    body.limb(start, _reach(start, angles[0], 0.1), 0.065, colours[1])


def draw_ball(rng: np.random.Generator, diameter: float) -> Image.Image:
    """A white ball with dark patches, darker below."""
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
