"""Generated football match scenes with exact boxes: a small COCO data set that needs no download.

A second canvas holds, for each point of the image, the number of the object that is on top, so that a box
encloses exactly the visible part of its object.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, ImageDraw

from detr_dist.data import synthetic_drawing as drawing
from detr_dist.data.synthetic_drawing import HEIGHT, OPAQUE, SUPERSAMPLING, WIDTH, Camera, Point
from detr_dist.errors import UsageError
from detr_dist.storage import check_new, new_folder

NUM_TRAIN, NUM_VAL, SEED = 512, 128, 0
CATEGORIES = {1: "player", 2: "ball"}
PLAYER_ID, BALL_ID = CATEGORIES
MISTAKABLE_ID = 0  # what looks like a ball and has no box
MIN_VISIBLE_SHARE = 0.25  # an object with less of its area visible gets no box
PLACING_ATTEMPTS = 5  # to find a place where a player hides nobody; after that, hiding is allowed
NO_PLAYER_SHARE, NO_BALL_SHARE, BALL_IN_AIR_SHARE = 0.05, 0.15, 0.25
MAX_PLAYERS = 7
PLAYER_M, BALL_M = 1.8, 0.22
MOST_IN_FOOTAGE = 22, 10  # players, and things that look like a ball
BLURRED_BALL_SHARE, PAN_SHARE = 0.5, 0.3
LEAST_SIZE_PX, MOST_SIZE_PX, LEAST_BALL_PX = 96, 8192, 2
# places on the pitch with something to see: spots, corners of areas, the centre, lines
LANDMARKS_M = (
    (11, 34), (16.5, 20), (52.5, 34), (52.5, 30), (1, 1), (28, 1), (5.5, 27), (20, 34), (51, 2), (30, 40),
)  # fmt: skip
BoxXywh = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class View:
    """The size of the images, and of what is in them."""

    size_px: tuple[int, int] = (WIDTH, HEIGHT)
    ball_px: tuple[float, float] | None = None
    """Diameters of a far and of a near ball, with players of natural size: a scene as in footage, with up to
    22 players, motion blur, and things that look like a ball. None: a ball larger than life, in proportion to
    the height of the image."""
    no_ball_share: float = NO_BALL_SHARE
    """Fraction of the scenes without a ball."""

    @classmethod
    def of(cls, size: str, ball_px: tuple[float, float] | None) -> Self:
        """Return the view of the options `--size` and `--ball-px`.

        Raises:
            UsageError: the size is not of the form 1280x720.
        """
        width, _, height = size.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"--size is {size}: give WIDTHxHEIGHT, e.g. 1280x720")
        return cls((int(width), int(height)), ball_px)

    @property
    def unit(self) -> float:
        """Return the height of the image in heights of the smallest scenes."""
        return self.size_px[1] / HEIGHT

    @property
    def spacing(self) -> float:
        """Return the size of players, relative to those in the smallest scenes."""
        return self.unit if self.ball_px is None else self.ball_px[1] * PLAYER_M / BALL_M / 65

    def ball_at(self, camera: Camera, row_px: float) -> float:
        """Return the diameter of a ball on the ground at a row."""
        px_per_m = float(camera.px_per_m(row_px))
        if self.ball_px is None:
            return 5 * self.unit + 0.19 * PLAYER_M * px_per_m
        return min(max(BALL_M * px_per_m, self.ball_px[0]), self.ball_px[1])


@dataclass(frozen=True, slots=True)
class Scene:
    """One image; `boxes_xywh_px[i]` encloses the visible part of an object of category `category_ids[i]`."""

    image: Image.Image
    category_ids: list[int]
    boxes_xywh_px: list[BoxXywh]


@dataclass(frozen=True, slots=True)
class _Thing:
    """A drawn object, where it stands in the image, and how high it is above that."""

    category_id: int
    sprite: Image.Image
    column_px: float
    row_px: float
    lift_px: float = 0.0

    @property
    def corners_sp(self) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the sprite, which may be outside the canvas."""
        left = round(self.column_px * SUPERSAMPLING - self.sprite.width / 2)
        bottom = round((self.row_px - self.lift_px) * SUPERSAMPLING)
        return left, bottom - self.sprite.height, left + self.sprite.width, bottom


def make_data(
    output_dir: Path,
    *,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    seed: int = SEED,
    view: View = View(),
) -> None:
    """Write `train` and `val` below `output_dir`, each with JPEGs and `_annotations.coco.json`.

    The same seed gives the same bytes (with the same Pillow and NumPy), and scene i of a split does not
    depend on the number of scenes. A folder is complete or absent.

    Raises:
        UsageError: impossible numbers, or folders that are not empty or cannot be written.
    """
    for option, number, least in (("num-train", num_train, 1), ("num-val", num_val, 1), ("seed", seed, 0)):
        if number < least:
            raise UsageError(f"--{option} is {number}: give a whole number of at least {least}")
    _check_view(view)
    train_dir, val_dir = output_dir / "train", output_dir / "val"
    for folder in (train_dir, val_dir):
        check_new("the folder", folder)
    try:
        with new_folder(train_dir) as train, new_folder(val_dir) as val:
            _write_split(train, num_train, (seed, 0), view)
            _write_split(val, num_val, (seed, 1), view)
    except OSError as error:
        where = error.filename or output_dir
        raise UsageError(f"cannot write {where}: {error.strerror or error}; choose another folder") from error


def _check_view(view: View) -> None:
    if not all(LEAST_SIZE_PX <= side <= MOST_SIZE_PX for side in view.size_px):
        raise UsageError(
            f"--size is {view.size_px[0]}x{view.size_px[1]}: give a width and a height of {LEAST_SIZE_PX} to "
            f"{MOST_SIZE_PX} pixels"
        )
    if view.ball_px is not None:
        (least, most), limit = view.ball_px, view.size_px[1] / 20  # higher players would not fit
        if not LEAST_BALL_PX <= least <= most <= limit:
            raise UsageError(
                f"--ball-px is {least:g} {most:g}: give two diameters of {LEAST_BALL_PX} to {limit:g} pixels "
                "(a twentieth of the height of the images), the smaller one first"
            )


def _write_split(folder: Path, num_scenes: int, entropy: tuple[int, int], view: View) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num_scenes):
        scene = draw_scene(np.random.default_rng(np.random.SeedSequence([*entropy, index])), view)
        name = f"{index + 1:06d}.jpg"
        scene.image.save(folder / name, quality=90, subsampling="4:4:4")
        images.append(
            {"id": index + 1, "file_name": name, "width": scene.image.width, "height": scene.image.height}
        )
        for category_id, box in zip(scene.category_ids, scene.boxes_xywh_px, strict=True):
            found = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": category_id}
            annotations.append(found | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": key, "name": name, "supercategory": "match"} for key, name in CATEGORIES.items()]
    document = {
        "info": {"description": "Generated football match scenes", "version": "1.0"},
        "licenses": [],
        "categories": categories,
        "images": images,
        "annotations": annotations,
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def draw_scene(rng: np.random.Generator, view: View = View()) -> Scene:
    """Draw one scene, a function of the generator's state and the view alone."""
    camera = _place_camera(rng, view)
    stand_px = int(rng.integers(10, 24)) if rng.random() < 0.4 else 0
    canvas = drawing.draw_grass(rng, camera)
    drawing.draw_markings(rng, canvas, camera)
    if stand_px:
        drawing.draw_stand(rng, canvas, stand_px, view.unit)
    things = sorted(_place_things(rng, camera, stand_px, view), key=lambda thing: thing.row_px)
    owners = _compose(canvas, things)
    visible_sp = owners.histogram()
    boxes = [_visible_box(owners, number, thing, visible_sp) for number, thing in enumerate(things, start=1)]
    if view.ball_px is not None and rng.random() < PAN_SHARE:
        canvas = drawing.pan(rng, canvas)
    kept = [
        (thing.category_id, box)
        for thing, box in zip(things, boxes, strict=True)
        if box is not None and thing.category_id != MISTAKABLE_ID
    ]
    return Scene(drawing.expose(rng, canvas), [category for category, _ in kept], [box for _, box in kept])


def _place_camera(rng: np.random.Generator, view: View) -> Camera:
    unit, height_px = view.unit, view.size_px[1]
    near_px, far_px = rng.uniform(56, 74) * unit, rng.uniform(26, 36) * unit  # heights of players
    if view.ball_px is not None:
        far_px, near_px = (diameter * PLAYER_M / BALL_M for diameter in view.ball_px)
        near_px = max(near_px, 1.05 * far_px)  # the horizon is above the image
    growth = (near_px - far_px) / (height_px - 35 * unit)
    x_m, y_m = LANDMARKS_M[int(rng.integers(len(LANDMARKS_M)))]
    target_m = (x_m + rng.normal(0, 2), y_m + rng.normal(0, 2))
    heading = rng.uniform(-math.pi, math.pi)
    return Camera(height_px - near_px / growth, PLAYER_M / growth, target_m, heading, view.size_px)


def _place_things(rng: np.random.Generator, camera: Camera, stand_px: int, view: View) -> list[_Thing]:
    kits, (width, height) = drawing.choose_kits(rng), view.size_px
    most_players, most_mistakable = (MAX_PLAYERS, 0) if view.ball_px is None else MOST_IN_FOOTAGE
    num_players = 0 if rng.random() < NO_PLAYER_SHARE else int(rng.integers(1, most_players + 1))
    things: list[_Thing] = []
    centre: Point = (rng.uniform(0.2, 0.8) * width, rng.uniform(0.4, 0.8) * height)
    for _ in range(num_players):
        column, row = _place_player(rng, centre, things, stand_px, view)
        height_px = float(camera.px_per_m(row)) * PLAYER_M * rng.uniform(0.93, 1.07)
        kit = kits[int(rng.choice(3, p=(0.45, 0.45, 0.1)))]
        sprite = drawing.draw_player(rng, kit, height_px * SUPERSAMPLING)
        things.append(_Thing(PLAYER_ID, sprite, column, row))
    if rng.random() >= view.no_ball_share:
        things.append(_place_ball(rng, camera, things, stand_px, view))
    for _ in range(int(rng.integers(most_mistakable + 1)) if most_mistakable else 0):
        column, row = rng.uniform(0, width), rng.uniform((stand_px + 18) * view.unit, height)
        sprite = drawing.draw_mistakable(rng, view.ball_at(camera, row) * SUPERSAMPLING)
        things.append(_Thing(MISTAKABLE_ID, sprite, column, row))
    return things


def _place_player(
    rng: np.random.Generator, centre: Point, others: list[_Thing], stand_px: int, view: View
) -> tuple[float, float]:
    """Choose column and row of a player's feet: near the action or anywhere, mostly away from others."""
    (width, height), unit = view.size_px, view.unit
    spread = (40 if rng.random() < 0.4 else 80) * unit
    apart_x, apart_y = 18 * view.spacing, 30 * view.spacing
    for _ in range(PLACING_ATTEMPTS):
        column = _near(rng, centre[0], spread, (-2 * unit, width + 2 * unit))
        row = _near(rng, centre[1], 0.7 * spread, (max(38, stand_px + 16) * unit, height + 12 * unit))
        if all(
            abs(column - other.column_px) > apart_x or abs(row - other.row_px) > apart_y for other in others
        ):
            break
    return column, row


def _near(rng: np.random.Generator, value: float, spread: float, limits: tuple[float, float]) -> float:
    """Return a number around `value`, or anywhere within the limits if that falls outside them."""
    number = rng.normal(value, spread)
    return number if limits[0] <= number <= limits[1] else rng.uniform(*limits)


def _place_ball(
    rng: np.random.Generator, camera: Camera, players: list[_Thing], stand_px: int, view: View
) -> _Thing:
    """Place a ball at someone's feet, alone or in the air."""
    (width, height), unit = view.size_px, view.unit
    least_row = (stand_px + 18) * unit
    column, row = rng.uniform(4 * unit, width - 4 * unit), rng.uniform(least_row, height - 3 * unit)
    if players and rng.random() < 0.5:
        owner = players[int(rng.integers(len(players)))]
        column = _near(rng, owner.column_px, 14 * view.spacing, (4 * unit, width - 4 * unit))
        row = _near(rng, owner.row_px + 2 * unit, 5 * view.spacing, (least_row, height - 1 * unit))
    lift = rng.uniform(0, 0.6 * row) if rng.random() < BALL_IN_AIR_SHARE else 0.0
    sprite = drawing.draw_ball(rng, view.ball_at(camera, row) * SUPERSAMPLING)
    if view.ball_px is not None and rng.random() < BLURRED_BALL_SHARE:
        sprite = drawing.blur_sprite(rng, sprite)
    return _Thing(BALL_ID, sprite, column, row, lift)


def _compose(canvas: Image.Image, things: list[_Thing]) -> Image.Image:
    """Paint the things and their shadows, far ones first; return the number on top at each point."""
    for thing in things:
        shadow = Image.new("L", (round(0.8 * thing.sprite.width) + 1, round(0.25 * thing.sprite.width) + 1))
        ImageDraw.Draw(shadow).ellipse((0, 0, shadow.width - 1, shadow.height - 1), fill=110)
        left = round(thing.column_px * SUPERSAMPLING - 0.35 * thing.sprite.width)
        top = round(thing.row_px * SUPERSAMPLING - 0.17 * thing.sprite.width)
        canvas.paste((15, 35, 15), (left, top, left + shadow.width, top + shadow.height), shadow)
    owners = Image.new("L", canvas.size)
    for number, thing in enumerate(things, start=1):
        canvas.paste(thing.sprite, thing.corners_sp, thing.sprite)
        owners.paste(number, thing.corners_sp, _opaque(thing.sprite))
    return owners


def _opaque(sprite: Image.Image) -> Image.Image:
    """Return 255 where a sprite is opaque, and 0 elsewhere."""
    return sprite.getchannel("A").point([255 * (value >= OPAQUE) for value in range(256)])


def _visible_box(owners: Image.Image, number: int, thing: _Thing, visible_sp: list[int]) -> BoxXywh | None:
    """Return the smallest box around the visible part of a thing; None if too little of it is visible."""
    whole_sp = sum(thing.sprite.getchannel("A").histogram()[OPAQUE:])
    if visible_sp[number] < MIN_VISIBLE_SHARE * whole_sp:
        return None
    is_number = [255 * (value == number) for value in range(256)]
    found = owners.crop(thing.corners_sp).point(is_number).getbbox()
    if found is None:
        return None
    left, top, right, bottom = (side / SUPERSAMPLING for side in found)
    origin_x, origin_y = (side / SUPERSAMPLING for side in thing.corners_sp[:2])
    return origin_x + left, origin_y + top, right - left, bottom - top
