"""From errors to exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped on request."""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detr_dist.errors import DetrDistError, StopRequested, UsageError, as_one_line, report_error


@contextmanager
def exiting_with_code(*, show_traceback: bool) -> Iterator[None]:
    """End the process with the exit code of an error, after its one line; 130 for Ctrl-C."""
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
    """Refuse an empty path, name or id: as a path it would be the current folder.

    Raises:
        UsageError: naming the option.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, equals, value = argument.partition("=")
        if not argument.strip() or (option.startswith("-") and equals and not value.strip()):
            name = option if equals else before if before.startswith("-") else "an argument"
            raise UsageError(f"{name} is empty; give a value (is a shell variable unset?)")
