"""Clips are found by file names, folders, patterns or similarity, or the reason why not is given."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_dist.data.clips import Clips, clip_name, find_clips
from detr_dist.errors import DataError, UsageError

HERE = Path("nowhere")


def members(clips: Clips, names: list[str]) -> dict[str, list[str]]:
    """Return the images of each clip."""
    return {
        clip: [name for name, own in zip(names, clips.of_images, strict=True) if own == number]
        for number, clip in enumerate(clips.names)
    }


@pytest.mark.parametrize(
    ("file_name", "clip"),
    [
        ("clip_0001.jpg", "clip"),
        ("match1_half2_000123.png", "match1_half2"),
        ("08fd33_3_6_png.rf.0f2b1c3d4e5f60718293a4b5c6d7e8f9.jpg", "08fd33_3"),
        ("goal_mp4-0012_jpg.rf.AbC9xyz.jpg", "goal_mp4"),
        ("match-1-frame12.png", "match-1"),
        ("video1_frame_0012.jpg", "video1"),
        ("clip1 (23).jpg", "clip1"),
        ("clip1_0001_left.jpg", "clip1"),
        ("IMG_20240501_120000.jpg", "IMG_20240501"),
        ("match-Scene-001-02.JPEG", "match-Scene-001"),
        ("Спартак_0001.jpg", "Спартак"),
        ("video1/000001.jpg", "video1"),
        ("video1/frame_000001.jpg", "video1"),
        ("./day 2/../video1//000001.jpg", "video1"),
        ("train/images/video1_000001.jpg", "video1"),
        ("train/video1/000001.jpg", "video1"),
        ("game/clip1_1.jpg", "game/clip1"),
        ("frame_000001.jpg", ""),
        ("IMG_1234.JPG", ""),
        ("DSC01234.jpg", ""),
        ("0001.jpg", ""),
        ("images/0001.jpg", ""),
    ],
)
def test_a_clip_is_the_file_name_before_the_frame_number(file_name: str, clip: str) -> None:
    assert clip_name(file_name) == clip


@pytest.mark.parametrize(
    "pattern", ["{clip}_{frame:04d}.jpg", "{clip}/{frame:06d}.png", "{clip} ({frame}).jpg"]
)
def test_names_that_tell_need_no_images(pattern: str) -> None:
    names = [pattern.format(clip=clip, frame=frame) for frame in range(9) for clip in ("b", "a", "c")]
    clips = find_clips(HERE, names, "clip")
    assert clips.names == ["a", "b", "c"]
    assert all(len({clip_name(name) for name in own}) == 1 for own in members(clips, names).values())
    assert str(clips) == "3 clips by file name, of 9 images, such as 'a'"


def write_views(folder: Path, names: list[str], views: list[int]) -> None:
    """Write an image for each name; images of one view look alike, but are not equal."""
    for i, (name, view) in enumerate(zip(names, views, strict=True)):
        colours = np.random.default_rng(view).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(colours).resize((60, 40))).copy()
        image[0, i % 60] = 255 - image[0, i % 60]
        Image.fromarray(image).save(folder / name)


def test_images_that_are_only_numbered_are_grouped_by_their_looks(tmp_path: Path) -> None:
    names = [f"{i:04d}.png" for i in range(8)]
    write_views(tmp_path, names, [1, 1, 2, 2, 2, 1, 3, 3])  # cuts to a camera and back
    clips = find_clips(tmp_path, names, "clip")
    assert [*members(clips, names).values()] == [
        ["0000.png", "0001.png", "0005.png"], ["0002.png", "0003.png", "0004.png"], ["0006.png", "0007.png"]
    ]  # fmt: skip
    assert "3 clips by look-alike images" in str(clips)
    assert find_clips(tmp_path, names[::-1], "clip").of_images == clips.of_images[::-1]


@pytest.mark.parametrize(
    ("pattern", "views", "fragment"),
    [
        ("{}.png", [1] * 4, "the images are only numbered, and all look alike"),
        ("clip_{}.png", [1] * 4, "the images are all of one clip, 'clip', and all look alike"),
        ("clip_{}.png", [1, 2, 3, 4], "'clip', and hardly any look alike"),
        ("player {}7 a1.png", [1, 2, 3, 4], "most images are alone in their clip, and hardly any look alike"),
    ],
)
def test_it_refuses_when_it_cannot_tell(
    pattern: str, views: list[int], fragment: str, tmp_path: Path
) -> None:
    names = [pattern.format(i) for i in range(4)]
    write_views(tmp_path, names, views)
    with pytest.raises(DataError) as raised:
        find_clips(tmp_path, names, "clip")
    assert fragment in str(raised.value)
    assert "--by folder" in str(raised.value)


def test_an_unreadable_image_is_named_where_the_looks_count(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        find_clips(tmp_path, ["1.png"], "clip")


def test_folders_are_clips_on_request() -> None:
    names = ["a/x_1.jpg", "a/y_2.jpg", "b/c/x_1.jpg", "x_3.jpg"]
    assert members(find_clips(HERE, names, "folder"), names) == {
        ".": ["x_3.jpg"], "a": ["a/x_1.jpg", "a/y_2.jpg"], "b/c": ["b/c/x_1.jpg"]
    }  # fmt: skip
    with pytest.raises(DataError, match="all 2 images are in one folder, 'a'"):
        find_clips(HERE, ["a/1.jpg", "a/2.jpg"], "folder")


def test_a_pattern_names_the_clip_by_its_first_group_or_all_of_it() -> None:
    names = ["m1_h1_1.jpg", "m1_h2_1.jpg", "m2_h1_1.jpg"]
    assert find_clips(HERE, names, r"^(m\d)_(h\d)").names == ["m1", "m2"]
    assert find_clips(HERE, names, r"m\d_h\d").names == ["m1_h1", "m1_h2", "m2_h1"]
    assert find_clips(HERE, names, ".+").names == names


@pytest.mark.parametrize(
    ("pattern", "fragment"),
    [
        ("(m", "--by '(m': not a regular expression: missing )"),
        ("m1_(h2)", "finds no clip in 2 of 3 file names, such as 'm1_h1_1.jpg', 'm2_h1_1.jpg'"),
        ("(x)?", "finds no clip in 3 of 3"),
        ("", "finds no clip in 3 of 3"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern: str, fragment: str) -> None:
    with pytest.raises(UsageError) as raised:
        find_clips(HERE, ["m1_h1_1.jpg", "m1_h2_1.jpg", "m2_h1_1.jpg"], pattern)
    assert fragment in str(raised.value)


def test_the_result_does_not_depend_on_the_order_of_the_files() -> None:
    names = [f"{clip}_{frame}.jpg" for clip in "dacb" for frame in range(5)]
    clips, reverse = find_clips(HERE, names, "clip"), find_clips(HERE, names[::-1], "clip")
    assert clips.names == reverse.names
    assert clips.of_images == reverse.of_images[::-1]
    assert set(Counter(clips.of_images).values()) == {5}
