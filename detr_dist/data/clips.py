"""The clip that each image of a data set is a frame of: by file name, folder, pattern or similarity."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import dirname, normpath

from detr_dist.data.columns import Finding, counted, found
from detr_dist.data.image_checks import lookalike_groups
from detr_dist.errors import DataError, UsageError
from detr_dist.text import list_names, value_of

SPLIT_FOLDERS = {"images", "test", "train", "training", "val", "valid", "validation"}
"""Names of folders that hold a split, or all images: they are no part of a clip's name."""

GENERIC_WORDS = {
    *("dsc", "dscf", "dscn", "f", "fr", "frame", "frames", "frm", "im", "image", "images", "img"),
    *("out", "output", "photo", "pic", "picture", "screenshot", "thumb"),
}
"""Words before a frame number that name no clip."""

_EXPORTED = re.compile(r"\.rf\.[^.]+$")  # Roboflow's hash, after the suffix that the image had before
_OLD_SUFFIX = re.compile(r"[_.](bmp|jpe?g|png|tiff?|webp)$", re.IGNORECASE)
_FRAME_NUMBER = re.compile(r"\d+\D*$")  # the last number
_SEPARATORS = " ._-([#"
_LAST_WORD = re.compile(r"(?:^|(?<=[ ._\-(\[#]))[a-z]+$", re.IGNORECASE)

MOSTLY = 0.5
"""File names tell clips apart if more than this fraction of the images have others in their clip."""


@dataclass(frozen=True, slots=True)
class Clips:
    """The clips of a data set, in the order of their names."""

    names: list[str]
    of_images: list[int]  # the clip of each image
    found_by: str  # how they were found, for a message

    def __str__(self) -> str:
        sizes = Counter(self.of_images)
        least, most = min(sizes.values()), max(sizes.values())
        num_images = counted(most, "image") if least == most else f"{least} to {most} images"
        largest = next(name for clip, name in enumerate(self.names) if sizes[clip] == most)
        return f"{counted(len(sizes), 'clip')} by {self.found_by}, of {num_images}, such as {largest!r}"


def find_clips(
    source: Path, file_names: Sequence[str], by: str, *, paths: Sequence[Path] | None = None
) -> Clips:
    """Find the clip of each image.

    Args:
        source: The folder that the file names are relative to, or what messages name if there are `paths`.
        file_names: The images, at least one.
        paths: The files of the images, if not all are in that folder.
        by: `clip` for the file name before the frame number, or groups of look-alike images if the names do
            not tell; `folder` for the folder of the file; otherwise a regular expression, whose first group
            or whole match in the file name, with its folders, names the clip.

    Raises:
        UsageError: the regular expression is invalid or does not match every name.
        DataError: it cannot be determined which images belong to one clip.
    """
    names = [normpath(name) for name in file_names]
    if by == "clip":
        clips = [clip_name(name) for name in names]
        if _tell_apart(clips):
            return _numbered(clips, "file name")
        return _by_looks(source, names, paths or [source / name for name in names], _why_unclear(clips))
    if by == "folder":
        folders = [dirname(name) or "." for name in names]
        if len(set(folders)) == 1:
            raise DataError(
                f"{source}: all {len(names)} images are in one folder, {value_of(folders[0])}, so it "
                "does not tell clips apart; give --by clip or a regular expression"
            )
        return _numbered(folders, "folder")
    return _numbered(_matches(by, names), "regular expression")


def clip_name(file_name: str) -> str:
    """Return the name of an image's clip: the file name before the frame number, with the file's folders.

    The frame number is the last number. Empty if the name is only a number or generic, as `frame_0001.jpg`.
    Folders named after splits do not count.
    """
    *folders, name = normpath(file_name).split("/")
    stem = _EXPORTED.sub("", name.rpartition(".")[0] or name)
    stem = _FRAME_NUMBER.sub("", _OLD_SUFFIX.sub("", stem)).rstrip(_SEPARATORS)
    word = _LAST_WORD.search(stem)
    if word and word[0].lower() in GENERIC_WORDS:
        stem = stem[: word.start()].rstrip(_SEPARATORS)
    parts = [folder for folder in folders if folder.lower() not in {*SPLIT_FOLDERS, ".", "..", ""}]
    return "/".join([*parts, stem] if stem else parts)


def clips_in_two_splits(names_by_split: Mapping[str, Sequence[str]]) -> dict[str, list[Finding]]:
    """Return, by split, a warning that names clips which an earlier split has frames of.

    A clip has a name and frames of different names. Where the names of all splits together do not tell clips
    apart, there are none.
    """
    counts = {split: Counter(map(clip_name, names)) for split, names in names_by_split.items()}
    findings: dict[str, list[Finding]] = {split: [] for split in counts}
    totals = Counter(map(clip_name, {name for names in names_by_split.values() for name in names}))
    if not _are_clips(totals):
        return findings
    earlier: dict[str, list[str]] = defaultdict(list)  # where the frames of a clip are
    for split, own in counts.items():
        both = sorted(clip for clip in own if clip and totals[clip] > 1 and clip in earlier)
        examples = (f"{clip} ({', '.join(earlier[clip])}, {own[clip]} here)" for clip in both)
        what = (
            "by file name that an earlier split has frames of; frames of one clip are nearly equal, so the "
            "metrics are too good: keep each clip in one split, as detr-dist split does"
        )
        findings[split] = found(
            "clip_in_two_splits", "clip", what, examples, count=len(both), level="warning"
        )
        for clip, count in own.items():
            earlier[clip].append(f"{counted(count, 'frame')} in {split}")
    return findings


def _are_clips(sizes: Mapping[str, int]) -> bool:
    """Return whether groups of these sizes are clips: several, and most images have others in theirs."""
    together = sum(size for size in sizes.values() if size > 1)
    return len([clip for clip in sizes if clip]) > 1 and together > MOSTLY * sum(sizes.values())


def _tell_apart(clips: Sequence[str]) -> bool:
    return _are_clips(Counter(clips))


def _why_unclear(clips: Sequence[str]) -> str:
    if len(set(clips)) == 1:
        only = f"all of one clip, {value_of(clips[0])}" if clips[0] else "only numbered"
        return f"by their names the images are {only}"
    return "by their names most images are alone in their clip"


def _by_looks(source: Path, names: Sequence[str], paths: Sequence[Path], why: str) -> Clips:
    """Return groups of images that look alike as clips.

    Raises:
        DataError: all look alike, or hardly any.
    """
    groups = lookalike_groups(paths)
    sizes = Counter(f"group {group}" for group in groups)
    if _are_clips(sizes):
        firsts: dict[int, str] = {}
        for name, group in sorted(zip(names, groups, strict=True)):
            firsts.setdefault(group, name)
        return _numbered([firsts[group] for group in groups], "look-alike images")
    looks = "all look alike" if len(sizes) == 1 else "hardly any look alike"
    raise DataError(
        f"{source}: cannot tell which images are of one clip: {why}, and {looks} (as "
        f"{list_names(sorted(names)[:2])}); put each clip into a folder and give --by folder, give a regular "
        "expression whose first group is the clip, as --by '^(match[0-9]+)_', or --by '.+' if the images "
        "are independent photographs"
    )


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--by {value_of(pattern)}: not a regular expression: {error}; correct it, or give clip or folder"
        ) from None
    found_in = [compiled.search(name) for name in names]
    clips = [_part(match) for match in found_in]
    unmatched = sorted(name for name, clip in zip(names, clips, strict=True) if not clip)
    if unmatched:
        raise UsageError(
            f"--by {value_of(pattern)}: finds no clip in {len(unmatched)} of {len(names)} file names, such "
            f"as {list_names(unmatched)}; correct the regular expression"
        )
    return [clip for clip in clips if clip]


def _part(match: re.Match[str] | None) -> str | None:
    return None if match is None else match[1 if match.re.groups else 0]


def _numbered(clips: Iterable[str], found_by: str) -> Clips:
    of_images = list(clips)
    names = sorted(set(of_images))
    numbers = {name: number for number, name in enumerate(names)}
    return Clips(names, [numbers[name] for name in of_images], found_by)
