"""YOLO's data.yaml: the class names, and where the images of each split are."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detr_dist.data.formats.annotations import SPLIT_OF_NAME
from detr_dist.errors import DataError
from detr_dist.text import list_names, value_of

YAML_NAMES = ("data.yaml", "data.yml")

_ABSENT = {"", "~", "null", "none"}


@dataclass(frozen=True, slots=True)
class YoloYaml:
    """The contents of a data.yaml."""

    path: Path
    root: Path
    """The folder that its paths are relative to."""
    names: dict[int, str]
    """Class names by the number that label files use."""
    splits: dict[str, list[str]]
    """The folders or lists of images of each split, as written but with / between folders."""

    def places(self, split: str) -> list[Path]:
        """Return the existing folders and lists of a split.

        Raises:
            DataError: one does not exist.
        """
        return [self.place(split, text) for text in self.splits[split]]

    def place(self, key: str, text: str) -> Path:
        """Return the existing path that a text means.

        Exports name folders beside the YAML as `../train/images`, and keep a `path` of another host; so this
        also looks beside the YAML, and without the leading `../`.

        Raises:
            DataError: no such path exists.
        """
        inside = re.sub(r"^(\.\.?/)+", "", text)
        tried = dict.fromkeys(
            base / name for name in (text, inside) for base in (self.root, self.path.parent)
        )
        for path in tried:
            if path.exists():
                return path
        raise DataError(
            f"{self.path}: {key} is {text!r}, which does not exist; correct it or 'path' (looked for "
            f"{list_names(tried)})"
        )


def find_yaml(folder: Path) -> Path | None:
    """Return the data.yaml in a folder.

    Raises:
        DataError: it has one of each spelling.
    """
    found = [folder / name for name in YAML_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: has data.yaml and data.yml; name the one to read, or remove one")
    return found[0] if found else None


def read_yaml(path: Path) -> YoloYaml:
    """Read a data.yaml.

    Raises:
        DataError: it is not one, or has no class names.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: broken YAML: {error.problem or error.context}; correct it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a YAML file in UTF-8: {reason}; save it as one") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check it and its permissions") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: is no data.yaml; it must have 'names', 'train' and 'val'")
    if "kpt_shape" in document:
        raise DataError(
            f"{path}: has 'kpt_shape', so its labels are keypoints; export the data set for detection"
        )
    names = _names(path, document)
    splits: dict[str, list[str]] = {}
    for key, split in SPLIT_OF_NAME.items():
        places = _texts(path, key, document.get(key))
        if places and splits.setdefault(split, places) != places:
            raise DataError(f"{path}: has several values for the split {split!r}; keep one of them")
    return YoloYaml(path, _root(path, document.get("path", "")), names, splits)


class _Loader(yaml.BaseLoader):
    """Reads all values as text, since YAML would make a boolean of a class called `no`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; one that gives a key twice is refused, where YAML would keep the last value."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {value_of(key.value)} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _names(path: Path, document: dict[str, Any]) -> dict[int, str]:
    """Return the class names by their numbers."""
    given = document.get("names")
    names = {str(i): name for i, name in enumerate(given)} if isinstance(given, list) else given
    if not names or not isinstance(names, dict):
        problem = "has no 'names'" if given is None else f"'names' is {value_of(given)}"
        raise DataError(f"{path}: {problem}; list the names of the classes, as names: [player, ball]")
    by_number: dict[int, str] = {}
    for key, name in names.items():
        if not re.fullmatch(r"\d{1,9}", key):
            raise DataError(f"{path}: 'names' has the key {key!r}; keys are the class numbers of the labels")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: class {key} has the name {value_of(name)}; give it a text")
        by_number[int(key)] = name
    repeated = [name for name in set(by_number.values()) if list(by_number.values()).count(name) > 1]
    if repeated or len(by_number) < len(names):
        raise DataError(f"{path}: 'names' lists {list_names(sorted(repeated))} twice; give each its own name")
    count = document.get("nc")
    if count is not None and str(count) != str(len(by_number)):
        raise DataError(f"{path}: nc is {value_of(count)}, but 'names' has {len(by_number)}; correct one")
    return by_number


def _texts(path: Path, key: str, value: Any) -> list[str]:
    """Return the value of a split as texts."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, str) for each in values):
        raise DataError(f"{path}: {key} is {value_of(value)}; it must be a folder, a .txt list, or several")
    return [_with_slashes(each) for each in values if each.lower() not in _ABSENT]


def _root(path: Path, text: Any) -> Path:
    if not isinstance(text, str):
        raise DataError(f"{path}: 'path' is {value_of(text)}; it must be a folder")
    for root in (path.parent / _with_slashes(text), Path(_with_slashes(text))):
        if text.lower() not in _ABSENT and root.is_dir():
            return root
    return path.parent


def _with_slashes(text: str) -> str:
    """Return a path that may have been written on Windows with / between its folders."""
    return text.strip().replace("\\", "/")
