"""From COCO's category ids to class indices 0..C-1."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detr_dist.data.annotations import Section
from detr_dist.data.layout import folded
from detr_dist.errors import DataError
from detr_dist.text import list_names

NO_SUPERCATEGORY = {"", "-", "n/a", "nan", "none", "null", "undefined"}
"""How exporters write that a category has no supercategory; a class of such a name groups nothing."""


@dataclass(frozen=True, slots=True)
class ClassMap:
    """Class `i` has the name `names[i]` and, in the JSON, the category id `category_ids[i]`."""

    names: tuple[str, ...]
    category_ids: tuple[int | None, ...]  # None where the JSON does not list the class
    dropped: tuple[str, ...]  # categories that only group others


@dataclass(frozen=True, slots=True)
class Category:
    """One that the JSON lists."""

    id: int
    name: str
    only_groups: bool  # no box uses it, and its name is the supercategory of another category


def map_classes(section: Section, used_ids: NDArray[np.int64]) -> ClassMap:
    """Classes in the order of their category ids, without the categories that only group others.

    Roboflow writes such a category with id 0.
    """
    categories = read_categories(section, used_ids)
    kept = [c for c in categories if not c.only_groups]
    _refuse_equal_names(section.path, [c.name for c in kept])
    if not kept:
        raise DataError(f"{section.path}: no usable category; 'categories' must list the classes to be found")
    dropped = tuple(c.name for c in categories if c.only_groups)
    return ClassMap(tuple(c.name for c in kept), tuple(c.id for c in kept), dropped)


def map_classes_onto(
    names: Sequence[str],
    section: Section,
    used_ids: NDArray[np.int64],
    source: str,
    *,
    may_lack: bool = False,
) -> ClassMap:
    """Classes in the order of `names`, whatever ids they have here; the JSON may lack some if `may_lack`.

    `source` says where the names come from, for the message.

    Raises:
        DataError: the names differ. A category that only groups others may be there or not.
    """
    categories = read_categories(section, used_ids)
    own = _usable_for(names, categories)
    _refuse_equal_names(section.path, [c.name for c in own])
    own_names = [c.name for c in own]
    _check_same_names([n for n in names if n in own_names or not may_lack], own_names, source, section.path)
    by_name = {c.name: c.id for c in own}
    dropped = tuple(c.name for c in categories if c not in own)
    return ClassMap(tuple(names), tuple(by_name.get(name) for name in names), dropped)


def differing_names(
    names: Sequence[str], section: Section, used_ids: NDArray[np.int64]
) -> tuple[list[str], list[str]]:
    """The classes that only `names` has, and those that only this JSON has."""
    return _differences(names, [c.name for c in _usable_for(names, read_categories(section, used_ids))])


def _usable_for(names: Sequence[str], categories: list[Category]) -> list[Category]:
    own = [c for c in categories if not c.only_groups]
    return own + [c for c in categories if c.only_groups and c.name in set(names) - {o.name for o in own}]


def _differences(names: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    return [name for name in names if name not in set(own)], [name for name in own if name not in set(names)]


def look_alike(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether some of the names differ in what cannot be seen, such as the Unicode normal form."""
    return bool({folded(name) for name in names} & {folded(name) for name in others})


def _check_same_names(names: Sequence[str], own: Sequence[str], source: str, path: Path) -> None:
    lacking, foreign = _differences(names, own)
    if not (lacking or foreign):
        return
    in_ascii = look_alike(lacking, foreign)
    parts = [f"{list_names(lacking, in_ascii=in_ascii)} only in {source}"] * bool(lacking)
    parts += [f"{list_names(foreign, in_ascii=in_ascii)} only here"] * bool(foreign)
    raise DataError(
        f"{path}: its classes differ from those of {source}: {'; '.join(parts)}; they must agree by name"
    )


def _refuse_equal_names(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: several categories have the name {list_names(twice)}; merge or rename them")


def read_categories(section: Section, used_ids: NDArray[np.int64]) -> list[Category]:
    """By ascending id.

    Raises:
        DataError: an id is no whole number or there twice, or a name is no text.
    """
    ids = section.integers("id").tolist()
    names = section.texts("name")
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise DataError(
            f"{section.path}: several categories have the id {list_names(twice)}; give each its own"
        )
    groups = [_group(record.get("supercategory")) for record in section.records]
    used, members = set(used_ids.tolist()), Counter(groups)
    rows = sorted(zip(ids, names, groups, strict=True))
    return [Category(i, name, i not in used and members[name] > (group == name)) for i, name, group in rows]


def _group(supercategory: object) -> str | None:
    """The name of the category that it is part of; None if it is part of none, however that is written."""
    is_name = isinstance(supercategory, str) and supercategory.strip().casefold() not in NO_SUPERCATEGORY
    return str(supercategory) if is_name else None
