"""Console output of a command: log messages on standard output, errors, and exit codes."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detr_dist.errors import DetrDistError, StopRequested, UsageError, as_one_line, report_error
from detr_dist.progress_bar import print_line
from detr_dist.redaction import redact

_PACKAGE = logging.getLogger("detr_dist")


def configure_logging() -> None:
    """Print the package's messages on standard output, one line each, with warnings marked."""
    _PACKAGE.setLevel(logging.INFO)
    _PACKAGE.propagate = False
    if not any(isinstance(handler, _StandardOutput) for handler in _PACKAGE.handlers):
        _PACKAGE.addHandler(_StandardOutput())


def log_to_file(path: Path) -> logging.Handler:
    """Append the package's messages to a file as well, with their time, until the handler is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    _PACKAGE.addHandler(handler)
    return handler


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            marked = f"{record.levelname.lower()}: {record.getMessage()}"
            record = logging.makeLogRecord(record.__dict__ | {"msg": marked, "args": ()})
        return redact(super().format(record))


class _StandardOutput(logging.Handler):
    """Prints on the current `sys.stdout`, without tracebacks, which the log file has.

    A record with `is_on_screen` is skipped, as it is there already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not getattr(record, "is_on_screen", False):
                without_traceback = record.__dict__ | {"exc_info": None, "exc_text": None}
                print_line(self.format(logging.makeLogRecord(without_traceback)))
        except Exception:
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """Records INFO and above whatever the process shows.

    On a full disk the file is incomplete without an error: the writers of checkpoints report it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._before = _PACKAGE.level, _PACKAGE.propagate
        self._above: _Above | None = None
        if not _PACKAGE.isEnabledFor(logging.INFO):
            self._above = _Above(_PACKAGE.getEffectiveLevel())
            _PACKAGE.addHandler(self._above)
            _PACKAGE.setLevel(logging.INFO)
            _PACKAGE.propagate = False

    def handleError(self, record: logging.LogRecord) -> None: ...

    def close(self) -> None:
        _PACKAGE.removeHandler(self)
        if self._above is not None:
            _PACKAGE.removeHandler(self._above)
            self._above = None
            level, _PACKAGE.propagate = self._before
            _PACKAGE.setLevel(level)
        with suppress(OSError):  # the disk may be full here too
            super().close()


class _Above(logging.Handler):
    """Passes records to the parent loggers' handlers, which get what they would get without a log file."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().callHandlers(record)


def make_robust() -> None:
    """Make standard output and error escape what they cannot encode, and ignore a closed pipe.

    A class may have a name that the terminal's encoding lacks. After the reader of a pipe has ended, as
    `head` does, nothing more is written to it, and the command still finishes its work.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # and not a notebook's own, or none
            stream.reconfigure(errors="backslashreplace")
            if stream is getattr(sys, f"__{name}__"):
                setattr(sys, name, _outliving_its_reader(stream))


def _outliving_its_reader(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return the same stream, which drops output once its reader is gone."""
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


@contextmanager
def exiting_with_code(*, show_traceback: bool) -> Iterator[None]:
    """Turn an error in the block into one line and its exit code, and end the process with that.

    0 done, 1 failed, 2 wrong usage or configuration, 75 stopped on request, 130 for Ctrl-C.
    """
    try:
        yield
    except StopRequested as request:
        if os.environ.get("RANK", "0") == "0":
            print(request, file=sys.stderr, flush=True)
        raise SystemExit(request.exit_code) from None
    except KeyboardInterrupt:
        report_error("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        is_ours = isinstance(error, DetrDistError)
        if show_traceback:
            traceback.print_exc()
        bug = "" if is_ours else " (a bug, or a problem of this host: --debug shows where)"
        report_error(str(error) if is_ours else f"{as_one_line(error)}{bug}")
        raise SystemExit(error.exit_code if isinstance(error, DetrDistError) else 1) from None


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty path, name or id: an empty path would mean the current folder.

    Raises:
        UsageError: naming the option.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("-") and equals and not value.strip()):
            name = option if equals else before if before.startswith("-") else "an argument"
            raise UsageError(f"{name} is empty; give a value (is a shell variable unset?)")
