"""Standard output and error that never end a command."""

import io
import os
import sys
from typing import Any


def make_robust() -> None:
    """Have standard output and error escape what they cannot encode, and outlive their reader.

    A class may have a name that the terminal's encoding lacks. Where the reader of a pipe has ended, as
    `head` does, nothing more is written to it, and the command still finishes its work.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # and not a notebook's own, or none
            stream.reconfigure(errors="backslashreplace")
            if stream is getattr(sys, f"__{name}__"):
                setattr(sys, name, _outliving_its_reader(stream))


def _outliving_its_reader(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, which drops what can no longer be read."""
    raw = _Descriptor(stream.fileno(), "wb", closefd=False)
    is_unbuffered = isinstance(stream.buffer, io.RawIOBase)  # by python -u
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Descriptor(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)
