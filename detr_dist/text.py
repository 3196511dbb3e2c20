"""Text that fits into a message of one line."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from detr_dist.redaction import redact

MAX_NAMES = 4
"""How many names a message lists before it counts the rest."""


def one_line(text: object, limit: int = 300) -> str:
    """Return text on one line of at most `limit` characters, without credentials."""
    return shorten(redact(" ".join(str(text).split())), limit)  # a cut could hide a password from redaction


def shorten(text: str, limit: int) -> str:
    """Return `text`, cut at its end to `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def value_of(value: Any, limit: int = 60) -> str:
    """Return a value as Python writes it, cut to `limit` characters."""
    return shorten(repr(value), limit)


def list_names(names: Iterable[object], *, in_ascii: bool = False) -> str:
    """Return the first `MAX_NAMES` names in quotes, and how many more there are."""
    quote = ascii if in_ascii else repr
    quoted = [quote(name if isinstance(name, str | int) else str(name)) for name in names]
    rest = len(quoted) - MAX_NAMES
    return ", ".join(quoted[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def printable(name: str) -> str:
    """Return the name; in quotes and escaped if a terminal could not show it."""
    return name if name.isprintable() else repr(name)


def hint_of_class(name: str, class_names: Sequence[str]) -> str:
    """Return the class whose name is nearest to an unknown one, as a question; if none is near, the first."""
    folded = {each.casefold(): each for each in reversed(class_names)}
    nearest = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    if nearest:
        return f"did you mean {printable(folded[nearest[0]])}?"
    return f"the classes of the data are {list_names(class_names)}"
