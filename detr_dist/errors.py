"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

import os
import sys

from detr_dist.redaction import redact
from detr_dist.text import one_line


class DetrDistError(Exception):
    """A failure with a clear message; the command line prints it without a traceback and exits with
    `exit_code`. The message holds no credentials, whatever it quotes."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class UsageError(DetrDistError):
    """Wrong option or configuration."""

    exit_code = 2


class DataError(DetrDistError):
    """The data set on disk cannot be used as it is."""


class LoaderError(DetrDistError):
    """Images cannot be loaded: the cause is the host or a bug, not the data set."""


class TrainingError(DetrDistError):
    """Training cannot continue."""


class CheckpointError(DetrDistError):
    """A checkpoint is corrupt, or holds what it must not."""


class StopRequested(DetrDistError):
    """The run was asked to stop, has saved, and wants to be run again."""

    exit_code = 75


def as_one_line(error: BaseException) -> str:
    """Return what an error says; of one that is not ours, its type as well."""
    if isinstance(error, DetrDistError):
        return " ".join(str(error).split())
    reason = one_line(error)
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def report_error(message: str) -> None:
    """Print the one line of an error, with the number of the process where there are several."""
    several = os.environ.get("WORLD_SIZE", "").strip() not in ("", "1")
    process = f"[process {os.environ.get('RANK', '?')}] " if several else ""
    for line in message.splitlines():
        print(f"{process}error: {redact(line)}", file=sys.stderr, flush=True)
