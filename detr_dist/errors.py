"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""


class DetrDistError(Exception):
    """A failure with a clear message; the command line prints it without a traceback and exits with
    `exit_code`."""

    exit_code = 1


class UsageError(DetrDistError):
    """Wrong option or configuration."""

    exit_code = 2


class DataError(DetrDistError):
    """The data set on disk cannot be used as it is."""


class TrainingError(DetrDistError):
    """Training cannot go on."""


class CheckpointError(DetrDistError):
    """A checkpoint is not whole, or holds what it must not."""


class StopRequested(DetrDistError):
    """The run was asked to stop, has saved, and wants to be run again."""

    exit_code = 75
