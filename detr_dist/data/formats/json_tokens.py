"""The tokens of a block of JSON, found by numpy: brackets, braces, colons, and the texts between quotes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_DEPTH = 100  # of nested lists and objects: far below Python's limit

STEPS = np.zeros(256, dtype=np.int8)  # what a byte changes in the depth
STEPS[list(b"{[")], STEPS[list(b"}]")] = 1, -1
_TOKENS = b'"{}[]:IN\r\n'  # I and N: only NaN and Infinity have them outside texts
_IS_TOKEN = bytes(byte in _TOKENS for byte in range(256))


class UnusualError(Exception):
    """The file needs the exact reader."""


class Tokens(NamedTuple):
    """The brackets, braces and colons outside texts, and what precedes each colon."""

    positions: NDArray[np.int64]
    depths: NDArray[np.int32]  # behind each token
    num_quotes: NDArray[np.int32]  # before each token
    quotes: NDArray[np.int64]

    def until(self, end: int) -> "Tokens":
        """Return the first `end` tokens."""
        return Tokens(self.positions[:end], self.depths[:end], self.num_quotes[:end], self.quotes)


def tokens_of(block: NDArray[np.uint8]) -> Tokens:
    """Return the tokens of a block that starts outside texts; line ends of a writable block become spaces."""
    visible = _without_escaped(block)
    is_token = np.frombuffer(visible.tobytes().translate(_IS_TOKEN), dtype=bool)  # faster than numpy's lookup
    positions = np.flatnonzero(is_token)
    kinds = visible[positions]
    is_quote = kinds == ord('"')
    num_quotes = np.cumsum(is_quote, dtype=np.int32)
    quotes = positions[is_quote]
    is_outside = ((num_quotes & 1) == 0) & ~is_quote
    positions, kinds, num_quotes = positions[is_outside], kinds[is_outside], num_quotes[is_outside]
    is_letter = (kinds == ord("I")) | (kinds == ord("N"))
    if is_letter.any():
        raise UnusualError("NaN or Infinity")
    is_line_end = (kinds == ord("\n")) | (kinds == ord("\r"))
    if is_line_end.any():
        if block.flags.writeable:
            block[positions[is_line_end]] = ord(" ")
        kept = ~is_line_end
        positions, kinds, num_quotes = positions[kept], kinds[kept], num_quotes[kept]
    depths = np.cumsum(STEPS[kinds], dtype=np.int32)
    if depths.max(initial=0) > _MOST_DEPTH:
        raise UnusualError("very deep nesting")
    return Tokens(positions, depths, num_quotes, quotes)


def _without_escaped(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the block with a space instead of each character that a backslash escapes."""
    slashes = np.flatnonzero(block == ord("\\"))
    if not len(slashes):
        return block
    starts = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # of runs of backslashes
    lengths = np.diff(np.append(starts, len(slashes)))
    behind = slashes[starts] + lengths
    behind = behind[(lengths % 2 == 1) & (behind < len(block))]
    block = block.copy()
    block[behind] = ord(" ")
    return block
