"""YAML files and `section.key=value` overrides, parsed into values and into the original texts."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detr_dist.errors import UsageError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the file's content twice: as values, and with every scalar as the text in the file."""
    try:
        tree, texts = _parse_yaml(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except yaml.reader.ReaderError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except _RepeatedKeyError as error:
        raise UsageError(f"{path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UsageError(f"{path}: not valid YAML{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: sections such as `training:` are wanted, found a {type(tree).__name__}")
    return tree, texts


_MERGE = "tag:yaml.org,2002:merge"


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key twice. YAML forbids it, but the parser silently keeps the last one."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                name, line = self.construct_object(key), key.start_mark.line + 1
                if name in lines:
                    raise _RepeatedKeyError(
                        f"line {line}: the key {key.value!r} is already in line {lines[name]}; "
                        "keep one of them"
                    )
                lines[name] = line
        return node


_Loader.yaml_implicit_resolvers = {  # no setting is a date
    first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse_yaml(text: bytes | str) -> tuple[Any, Any]:
    """Return the content of a YAML text twice: as values, and with every scalar as the text in it.

    Bytes are UTF-8 or UTF-16 with a byte-order mark.

    Raises:
        yaml.YAMLError, ValueError: it is not YAML, or has a key twice.
    """
    return yaml.load(text, _Loader), yaml.load(text, yaml.BaseLoader)


def split_override(override: str) -> tuple[list[str], str]:
    """Split `section.key=value` into its keys, two or more, and its value."""
    # In a locale other than UTF-8, Python escapes the bytes of the command line that it cannot decode.
    override = override.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    keys_text, equals, value_text = override.partition("=")
    keys = keys_text.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UsageError(f"{override!r} is not of the form section.key=value, e.g. training.batch_size=8")
    return keys, value_text


def parse_value(override: str, value_text: str) -> tuple[Any, Any]:
    """Return the value of an override twice: parsed, and with every scalar as the text in it."""
    if re.match(r"[^\s\"'{\[|>].*\s#|#", value_text):  # part of a file's name, not a comment
        return value_text, value_text
    try:
        return _parse_yaml(value_text)
    except _RepeatedKeyError as error:
        raise UsageError(f"{override!r}: {error}") from None
    except (yaml.YAMLError, ValueError):
        raise UsageError(
            f"{override!r}: the value is not valid YAML; quote it if it holds special characters"
        ) from None


def set_key(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set one key; `keys` may go deeper than section.key, into a mapping such as model.config_overrides."""
    *parents, last = keys
    for key in parents:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[last] = value


def describe_problem(problem: Any, keys: Mapping[str, Sequence[str]]) -> str:
    """Return one of pydantic's errors as a line: the key as the user writes it, and the expected value.

    Args:
        problem: One of pydantic's `errors()`.
        keys: All keys by section, and those of a mapping in one, such as data.copy_paste.
    """
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "of_parts":
        return str(problem["msg"])
    if problem["type"] == "extra_forbidden":
        return _describe_unknown(location, keys)
    key = ".".join(location[: 3 if ".".join(location[:2]) in keys else 2])
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    is_named = problem["type"] == "unknown_name"  # by its message
    is_section = isinstance(value, dict) and problem["type"] == "value_error"
    shown = "" if is_named or is_section else f", got {value!r}"
    return f"{f'{key}: ' if key else ''}{message[0].lower()}{message[1:]}{shown}"


def _describe_unknown(location: list[str], keys: Mapping[str, Sequence[str]]) -> str:
    *section, key = location
    known = list(keys[".".join(section)]) if section else [name for name in keys if "." not in name]
    elsewhere = [f"{name}.{key}" for name, fields in keys.items() if key in fields]
    close = [".".join([*section, name]) for name in difflib.get_close_matches(key, known, n=1, cutoff=0.4)]
    nearest = elsewhere or close
    hint = f"did you mean {nearest[0]}?" if nearest else f"valid keys: {', '.join(known)}"
    return f"{'.'.join(location)}: unknown configuration key; {hint}"
