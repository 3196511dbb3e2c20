"""Checks of the image files of a data set, each decoded as in training."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from posixpath import normpath

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as F

from detr_dist.config_types import ExifRule
from detr_dist.data.coco import CocoData
from detr_dist.data.columns import Finding, Level, found
from detr_dist.data.images import decoded_name
from detr_dist.data.records import RULES
from detr_dist.errors import DataError
from detr_dist.progress_bar import ProgressBar
from detr_dist.serving.decoding import UnreadableImageError, decode_rgb, open_image
from detr_dist.serving.exif import turn_of, turn_to_upright

IMAGES_AT_A_TIME = 256
"""Images passed to the threads at once, so that no queue holds a million images."""

COMPARED_AT_A_TIME = 64

THUMBNAIL_EDGE = 16
LOOKALIKE_CORRELATION = 0.95
"""Correlation of the grey values of two thumbnails that counts as alike. Measured: one view photographed
twice, refocused in between, has 0.99; no two of 640 generated scenes on grass have more than 0.87."""

MIN_CONTRAST = 16.0
"""Least norm by which a thumbnail is divided: one flatter than a grey level per pixel resembles no other."""

DARK = 16
"""Largest level, of 255, of an image that is nearly black: 12 bits stored in the low end of 16 stay below."""

_KINDS: dict[str, tuple[Level, str]] = {
    "unreadable_image": ("error", RULES["unreadable_image"][1]),
    "wrong_size": ("error", "of another size than the JSON says; correct the JSON or save them in that size"),
    "exif_rotation": (
        "warning",
        "with an EXIF rotation that training does not apply; if their boxes are rotated, set data.exif=apply",
    ),
    "dark_picture": (
        "warning",
        f"without a pixel brighter than {DARK} of 255; if 10 or 12 bits are stored as 16, scale them up",
    ),
    "picture_in_two_splits": (
        "error",
        "of an earlier split, pixel for pixel; keep each in one split, or metrics are too good",
    ),
    "lookalike_in_two_splits": (
        "warning",
        "looking like one of an earlier split; frames of one shot, or copies, make metrics too good",
    ),
    "duplicate_picture": ("warning", "that another file of the split holds, pixel for pixel"),
}


@dataclass(frozen=True, slots=True)
class _Summary:
    """The data kept of an image, about a kilobyte whatever its size."""

    size_hw: tuple[int, int] = (0, 0)
    digest: bytes = b""  # of size and pixels
    thumbnail: NDArray[np.float32] | None = None  # of length 1 around its mean
    brightest: int = 255  # level of its pixels
    lacks_rotation: bool = False  # its EXIF data have one, which training does not apply
    failure: str = ""  # why it cannot be decoded


class ImageCheck:
    """Checks the images of one split after the other, and keeps about a kilobyte of each."""

    def __init__(self) -> None:
        self._files: dict[bytes, str] = {}  # of earlier splits, one file for each content
        self._thumbnails: list[NDArray[np.float32]] = []  # of these, in the same order
        self._files_of_split: dict[bytes, str] = {}  # likewise of the other sources of this split
        self._thumbnails_of_split: list[NDArray[np.float32]] = []

    def check(
        self, split: str, data: CocoData, missing: frozenset[str], *, is_new_split: bool = True
    ) -> list[Finding]:
        """Return the findings on the image files of `data`, except those that are known to be missing.

        If it `is_new_split`, its images must not be in what was checked before; otherwise it is a further
        source of the same split.
        """
        if is_new_split:
            self._files |= self._files_of_split
            self._thumbnails += self._thumbnails_of_split
            self._files_of_split, self._thumbnails_of_split = {}, []
        rows_of = defaultdict(list)  # several rows if a file is listed more than once
        for row, name in enumerate(map(decoded_name, data.file_names)):
            if name not in missing:
                rows_of[normpath(name)].append(row)
        examples = defaultdict(list)
        own: dict[bytes, str] = {}
        thumbnails: list[NDArray[np.float32]] = []
        sizes_hw = {name: data.size_hw(rows[0]) for name, rows in rows_of.items()}
        for name, image in _look_at_all(data.images_dir, sizes_hw, data.exif, split):
            if image.thumbnail is None:
                examples["unreadable_image"].append(image.failure)
                continue
            wrong_hw = [size for size in map(data.size_hw, rows_of[name]) if size != image.size_hw]
            examples["wrong_size"] += [_difference(name, image, size_hw) for size_hw in wrong_hw]
            if image.lacks_rotation and not wrong_hw:
                examples["exif_rotation"].append(name)
            if image.brightest <= DARK:
                examples["dark_picture"].append(name)
            if image.digest in self._files:
                examples["picture_in_two_splits"].append(f"{name} is {self._files[image.digest]}")
            elif (same := own.get(image.digest) or self._files_of_split.get(image.digest)) is not None:
                examples["duplicate_picture"].append(f"{name} is {same}")
            else:
                own[image.digest] = name
                thumbnails.append(image.thumbnail)
        examples["lookalike_in_two_splits"] = self._lookalikes(list(own.values()), thumbnails)
        self._files_of_split |= {digest: str(data.images_dir / name) for digest, name in own.items()}
        self._thumbnails_of_split += thumbnails
        return [
            finding
            for kind, (level, what) in _KINDS.items()
            for finding in found(kind, "image", what, examples[kind], level=level)
        ]

    def _lookalikes(self, names: list[str], thumbnails: list[NDArray[np.float32]]) -> list[str]:
        """Return the images that look like one of an earlier split."""
        if not (self._thumbnails and thumbnails):
            return []
        earlier, files = np.array(self._thumbnails).T, list(self._files.values())
        alike = []
        for start in range(0, len(names), COMPARED_AT_A_TIME):
            likeness = np.array(thumbnails[start : start + COMPARED_AT_A_TIME]) @ earlier
            nearest = likeness.argmax(axis=1)
            for i in np.flatnonzero(likeness.max(axis=1) > LOOKALIKE_CORRELATION).tolist():
                alike.append(f"{names[start + i]} is like {files[nearest[i]]}")
        return alike


def lookalike_groups(paths: Sequence[Path]) -> list[int]:
    """Return a number for each image, equal for images that look alike, also through others in between.

    The images of a shot look like their neighbours in time, and so form one group.

    Raises:
        DataError: an image cannot be decoded.
    """
    thumbnails = []
    for _, image in _look_at_all(Path(), dict.fromkeys(map(str, paths)), "ignore", "looking for clips"):
        if image.thumbnail is None:
            raise DataError(f"{image.failure}; restore or remove it")
        thumbnails.append(image.thumbnail)
    every = np.array(thumbnails)
    groups = np.arange(len(every))
    for start in range(0, len(every), COMPARED_AT_A_TIME):
        likeness = every[start : start + COMPARED_AT_A_TIME] @ every.T
        for i, is_alike in enumerate(likeness > LOOKALIKE_CORRELATION, start):
            linked = np.union1d(groups[is_alike], groups[i])
            if len(linked) > 1:
                groups[np.isin(groups, linked)] = linked[0]
    numbers: list[int] = groups.tolist()
    return numbers


def _look_at_all(
    images_dir: Path, sizes_hw: Mapping[str, tuple[int, int] | None], exif: ExifRule, title: str
) -> Iterator[tuple[str, _Summary]]:
    """Yield each file with its summary; `sizes_hw` has the annotated size of each, if it has one."""
    names = list(sizes_hw)
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads, closing(ProgressBar(title, len(names))) as bar:
        for start in range(0, len(names), IMAGES_AT_A_TIME):
            some = names[start : start + IMAGES_AT_A_TIME]
            sizes = [sizes_hw[name] for name in some]
            summaries = threads.map(_look_at, map(images_dir.joinpath, some), repeat(exif), sizes)
            for name, image in zip(some, summaries, strict=True):
                yield name, image
                bar.advance()


def _look_at(path: Path, exif: ExifRule, annotated_hw: tuple[int, int] | None) -> _Summary:
    try:
        image = decode_rgb(path, exif, annotated_hw)
    except UnreadableImageError as error:
        return _Summary(failure=str(error))
    height, width = image.shape[-2:]
    digest = hashlib.sha256(f"{height}x{width}".encode())
    digest.update(image.permute(1, 2, 0).contiguous().numpy().data)  # interleaved, as most decoders leave it
    thumbnail = F.resize(image, [THUMBNAIL_EDGE, THUMBNAIL_EDGE], antialias=True).float().mean(dim=0)
    around_mean = (thumbnail - thumbnail.mean()).flatten()
    length = float(around_mean.norm())
    return _Summary(
        size_hw=(height, width),
        digest=digest.digest(),
        thumbnail=(around_mean / max(length, MIN_CONTRAST)).numpy(),
        brightest=int(image.max()),
        lacks_rotation=lacks_rotation(path, exif, annotated_hw),
    )


def lacks_rotation(path: Path, exif: ExifRule, annotated_hw: tuple[int, int] | None) -> bool:
    """Return whether the EXIF data of an image have a rotation that the rule `exif` does not apply."""
    with suppress(UnreadableImageError), open_image(path) as image:  # its pixels were decoded
        return turn_of(image, exif, annotated_hw) != turn_to_upright(image)
    return False


def _difference(name: str, image: _Summary, annotated_hw: tuple[int, int]) -> str:
    (height, width), (annotated_height, annotated_width) = image.size_hw, annotated_hw
    turned = " (its EXIF rotation is not applied)" if image.lacks_rotation else ""
    return f"{name} is {width}x{height}, not {annotated_width}x{annotated_height}{turned}"
