"""Generated match scenes: equal seeds give equal bytes, and boxes cover the visible pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_dist.data import synthetic
from detr_dist.data.synthetic import BALL_ID, BALL_M, PLAYER_ID, PLAYER_M, Scene, View, draw_scene, make_data
from detr_dist.data.synthetic_drawing import (
    HEIGHT,
    SUPERSAMPLING,
    WIDTH,
    Camera,
    blur_sprite,
    choose_kits,
    draw_ball,
    draw_player,
)
from detr_dist.errors import UsageError

NUM_SCENES = 240


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def annotations(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "_annotations.coco.json").read_text())
    return document


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([7, index])) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("generated")
    make_data(output_dir, num_train=6, num_val=3, seed=1)
    return output_dir


def test_the_same_seed_writes_the_same_bytes(data_dir: Path, tmp_path: Path) -> None:
    make_data(tmp_path, num_train=6, num_val=3, seed=1)
    assert contents(tmp_path) == contents(data_dir)


def test_another_seed_writes_other_images(data_dir: Path, tmp_path: Path) -> None:
    make_data(tmp_path, num_train=6, num_val=3, seed=2)
    first, second = contents(tmp_path), contents(data_dir)
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_a_scene_does_not_depend_on_the_number_of_scenes(data_dir: Path, tmp_path: Path) -> None:
    make_data(tmp_path, num_train=2, num_val=1, seed=1)
    for split, num_scenes in (("train", 2), ("val", 1)):
        for number in range(1, num_scenes + 1):
            name = f"{number:06d}.jpg"
            assert (tmp_path / split / name).read_bytes() == (data_dir / split / name).read_bytes()
        few, many = annotations(tmp_path / split), annotations(data_dir / split)
        assert few["images"] == many["images"][:num_scenes]
        assert few["annotations"] == [item for item in many["annotations"] if item["image_id"] <= num_scenes]


def test_train_and_val_have_no_image_in_common(data_dir: Path) -> None:
    files = contents(data_dir)
    images = [content for name, content in files.items() if name.endswith(".jpg")]
    assert len(images) == len(set(images)) == 9


@pytest.mark.parametrize(("split", "num_images"), [("train", 6), ("val", 3)])
def test_a_split_is_a_complete_coco_data_set(data_dir: Path, split: str, num_images: int) -> None:
    document = annotations(data_dir / split)
    assert [(item["id"], item["name"]) for item in document["categories"]] == [(1, "player"), (2, "ball")]
    assert len({item["id"] for item in document["images"]}) == len(document["images"]) == num_images
    assert len({item["id"] for item in document["annotations"]}) == len(document["annotations"]) > 0
    for item in document["images"]:
        with Image.open(data_dir / split / item["file_name"]) as image:
            assert (image.format, image.mode, image.size) == (
                "JPEG",
                "RGB",
                (item["width"], item["height"]),
            )
    listed = {item["file_name"] for item in document["images"]} | {"_annotations.coco.json"}
    assert listed == {path.name for path in (data_dir / split).iterdir()}
    for item in document["annotations"]:
        assert item["image_id"] in {image["id"] for image in document["images"]}
        assert item["iscrowd"] == 0
        assert item["area"] == item["bbox"][2] * item["bbox"][3]


def test_every_box_has_an_extent_and_lies_inside_its_image(scenes: list[Scene]) -> None:
    boxes = np.array([box for scene in scenes for box in scene.boxes_xywh_px])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    # exact: corners are multiples of a quarter of a pixel, so their sums are not rounded
    assert (boxes[:, 0] + boxes[:, 2] <= WIDTH).all()
    assert (boxes[:, 1] + boxes[:, 3] <= HEIGHT).all()


FOOTAGE = View((640, 360), (5, 9))


def test_scenes_as_in_footage_have_balls_of_the_given_size_and_players_of_natural_size(
    tmp_path: Path,
) -> None:
    make_data(tmp_path, num_train=24, num_val=1, view=FOOTAGE)
    document = annotations(tmp_path / "train")
    heights: dict[int, list[float]] = {PLAYER_ID: [], BALL_ID: []}
    for item in document["annotations"]:
        x, y, width, height = item["bbox"]
        assert min(x, y) >= 0
        assert x + width <= 640
        assert y + height <= 360
        heights[item["category_id"]].append(height)
    for image in document["images"]:
        with Image.open(tmp_path / "train" / image["file_name"]) as stored:
            assert stored.size == (image["width"], image["height"]) == FOOTAGE.size_px
    assert len(heights[BALL_ID]) > 10
    # Sprites have whole pixels of the larger drawing, and a blur, at half its opacity, one more of these.
    assert max(heights[BALL_ID]) <= 9.5
    assert np.median(heights[BALL_ID]) >= 5
    ratio = np.median(heights[PLAYER_ID]) / np.median(heights[BALL_ID])
    assert ratio == pytest.approx(PLAYER_M / BALL_M, rel=0.3), "they run, kick and hide each other"
    assert len(heights[PLAYER_ID]) / 24 > 7


def test_the_size_alone_scales_a_scene() -> None:
    small, large = (draw_scene(np.random.default_rng([3, 1]), View((192 * k, 160 * k))) for k in (1, 2))
    assert large.image.size == (384, 320)
    assert {*small.category_ids} <= {PLAYER_ID, BALL_ID}
    sides = [np.median([box[3] for box in scene.boxes_xywh_px]) for scene in (small, large)]
    assert sides[1] == pytest.approx(2 * sides[0], rel=0.5), "other people"


def test_the_fraction_of_scenes_without_a_ball_can_be_chosen() -> None:
    def num_with_ball(no_ball_share: float) -> int:
        view = View(no_ball_share=no_ball_share)
        scenes = [draw_scene(np.random.default_rng([5, index]), view) for index in range(12)]
        return sum(BALL_ID in scene.category_ids for scene in scenes)

    assert num_with_ball(1) == 0
    assert num_with_ball(0) >= 10, "players may hide a ball"


def test_a_blurred_ball_keeps_its_size_where_it_is_half_opaque() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        ball = draw_ball(rng, 36.0)
        opacity = np.asarray(blur_sprite(rng, ball).getchannel("A"))
        assert opacity.shape != (36, 36)
        rows, columns = np.nonzero(opacity >= 128)
        # A circle on a grid is 36 +- 1 wide in every direction.
        assert abs(int(np.ptp(rows)) - 35) <= 2
        assert abs(int(np.ptp(columns)) - 35) <= 2
        assert 0 < opacity.min(initial=255, where=opacity > 0) < 128


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View((95, 160)), "--size is 95x160: give a width and a height of 96 to 8192 pixels"),
        (View((640, 360), (9, 5)), "--ball-px is 9 5: give two diameters of 2 to 18 pixels"),
        (View((640, 360), (1, 5)), "--ball-px is 1 5"),
        (View((640, 360), (6, 30)), "--ball-px is 6 30"),
    ],
)
def test_an_impossible_view_is_refused(tmp_path: Path, view: View, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_data(tmp_path / "out", view=view)
    assert not (tmp_path / "out").exists()


def test_some_scenes_lack_the_ball_or_the_players_or_both(scenes: list[Scene]) -> None:
    no_ball = np.array([BALL_ID not in scene.category_ids for scene in scenes])
    no_player = np.array([PLAYER_ID not in scene.category_ids for scene in scenes])
    # four standard deviations of a fraction of 240 draws; hidden objects add a little to the first
    assert 0.06 < no_ball.mean() < 0.26
    assert 0.004 < no_player.mean() < 0.12
    assert any(not draw_scene(np.random.default_rng([0, 0, index])).category_ids for index in range(200))


def test_there_is_at_most_one_ball_and_it_is_large_enough_to_learn(scenes: list[Scene]) -> None:
    assert max(scene.category_ids.count(BALL_ID) for scene in scenes) == 1
    assert max(len(scene.category_ids) for scene in scenes) <= synthetic.MAX_PLAYERS + 1
    heights: dict[int, list[float]] = {PLAYER_ID: [], BALL_ID: []}
    for scene in scenes:
        for category_id, box in zip(scene.category_ids, scene.boxes_xywh_px, strict=True):
            heights[category_id].append(box[3])
    assert np.percentile(heights[BALL_ID], 10) >= 7
    assert max(heights[BALL_ID]) < 20
    assert np.percentile(heights[PLAYER_ID], 10) >= 20
    assert np.percentile(heights[PLAYER_ID], 90) < 60


def boxes_of_squares(*places_px: tuple[float, float]) -> list[synthetic.BoxXywh | None]:
    """Return boxes of opaque squares of 10 px with these bottom centres, later ones in front."""
    square = Image.new("RGBA", (10 * SUPERSAMPLING, 10 * SUPERSAMPLING), (255, 255, 255, 255))
    things = [synthetic._Thing(PLAYER_ID, square, column, row) for column, row in places_px]
    owners = synthetic._compose(Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING)), things)
    visible_sp = owners.histogram()
    return [synthetic._visible_box(owners, i, thing, visible_sp) for i, thing in enumerate(things, start=1)]


def test_the_box_of_an_unoccluded_object_is_exactly_its_extent() -> None:
    assert boxes_of_squares((50.25, 60.5)) == [(45.25, 50.5, 10, 10)]


def test_a_box_ends_at_the_border_of_the_image() -> None:
    assert boxes_of_squares((1, 60)) == [(0, 50, 6, 10)]
    assert boxes_of_squares((WIDTH - 2, HEIGHT + 3)) == [(WIDTH - 7, HEIGHT - 7, 7, 7)]


def test_a_box_ends_where_an_object_in_front_starts() -> None:
    assert boxes_of_squares((50, 60), (56, 60)) == [(45, 50, 6, 10), (51, 50, 10, 10)]


@pytest.mark.parametrize("place_px", [(-3, 60), (-30, 60), (60, -1), (60, HEIGHT + 8)])
def test_an_object_almost_outside_the_image_has_no_box(place_px: tuple[float, float]) -> None:
    assert boxes_of_squares(place_px) == [None]


def test_an_object_almost_fully_occluded_has_no_box() -> None:
    assert boxes_of_squares((50, 60), (52, 60)) == [None, (47, 50, 10, 10)]


def test_pixels_mapped_to_the_pitch_and_back_are_unchanged() -> None:
    camera = Camera(horizon_px=-40.0, height_m=6.0, target_m=(11.0, 34.0), heading=0.8)
    back = camera.to_image(np.stack(camera.to_pitch(), axis=-1))
    # float64 through a rotation and a division; a pixel is 1.0
    np.testing.assert_allclose(
        back[..., 0], np.broadcast_to(np.arange(WIDTH) + 0.5, (HEIGHT, WIDTH)), atol=1e-9
    )
    np.testing.assert_allclose(
        back[..., 1].T, np.broadcast_to(np.arange(HEIGHT) + 0.5, (WIDTH, HEIGHT)), atol=1e-9
    )


def test_sprites_fill_their_images_and_are_opaque_or_transparent() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for sprite in (draw_player(rng, choose_kits(rng)[0], 150.0), draw_ball(rng, 40.0)):
            opaque = sprite.getchannel("A")
            assert opaque.getbbox() == (0, 0, *sprite.size)
            assert set(np.unique(np.asarray(opaque))) == {0, 255}


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_val": 0}, {"num_train": -5}, {"seed": -1}])
def test_invalid_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(wrong)).replace("_", "-")):
        make_data(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_with_content_is_not_changed(tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir()
    (tmp_path / split / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="delete it or choose another"):
        make_data(tmp_path, num_train=1, num_val=1)
    assert contents(tmp_path) == {f"{split}/mine.txt": b"keep"}


def test_empty_folders_and_files_of_a_killed_run_are_replaced(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / ".val.partial").mkdir()
    (tmp_path / ".val.partial" / "000001.jpg").write_text("half")
    make_data(tmp_path, num_train=6, num_val=3, seed=1)
    assert contents(tmp_path) == contents(data_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_a_run_that_fails_leaves_no_split_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(rng: np.random.Generator, view: View) -> Scene:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "draw_scene", no_space)
    with pytest.raises(UsageError, match="No space left on device"):
        make_data(tmp_path, num_train=1, num_val=1)
    assert not (tmp_path / "train").exists()
    assert not (tmp_path / "val").exists()


@pytest.mark.parametrize("blocked", ["out", "out/train"])
def test_a_file_that_blocks_the_folder_is_named(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file")
    with pytest.raises(UsageError, match=str(tmp_path / "out")):
        make_data(tmp_path / "out", num_train=1, num_val=1)
    assert (tmp_path / blocked).read_text() == "a file"
