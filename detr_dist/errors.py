"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

import os
import sys

from detr_dist.redaction import redact
from detr_dist.text import one_line


class DetrDistError(Exception):
    """A failure with a message that the user can act on, without credentials.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class UsageError(DetrDistError):
    """An option or the configuration is wrong."""

    exit_code = 2


class DataError(DetrDistError):
    """The data set on disk cannot be used as it is."""


class LoaderError(DetrDistError):
    """Images cannot be loaded: the cause is the host or a bug, not the data set."""


class TrainingError(DetrDistError):
    """Training cannot continue."""


class CheckpointError(DetrDistError):
    """A checkpoint is corrupt, or contains something that it must not."""


class StopRequested(DetrDistError):
    """The run was asked to stop, has saved, and can be resumed."""

    exit_code = 75


def as_one_line(error: BaseException) -> str:
    """Return an error's message on one line, with its type unless it is a `DetrDistError`."""
    if isinstance(error, DetrDistError):
        return " ".join(str(error).split())
    reason = one_line(error)
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def report_error(message: str) -> None:
    """Print an error as one line on standard error, with the process's number if there are several."""
    several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")
    process = f"[process {os.environ.get('RANK', '?')}] " if several else ""
    for line in message.splitlines():
        print(f"{process}error: {redact(line)}", file=sys.stderr, flush=True)
