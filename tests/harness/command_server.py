"""Run `detr-dist` commands, each in its own process that is forked from this one.

Importing what a command needs takes ten seconds, forking a process that has imported it almost none. Reads
one request per line as JSON: either what to start, answered with its process id, or the process id to wait
for, answered with its exit code (negative for a signal).
"""

import json
import os
import sys
from typing import Any

import detr_dist.tracking.mlflow  # noqa: F401  imports that are worth sharing
import detr_dist.training.trainer  # noqa: F401
from detr_dist.cli import main as run_command


def start(request: dict[str, Any]) -> int:
    """Fork; return the child's process id in the parent, and 0 in the child, which is then ready to run."""
    child = os.fork()
    if child == 0:
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return child


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        else:
            answer = start(request)
            if answer == 0:
                sys.argv = ["detr-dist", *request["arguments"]]
                run_command(request["arguments"])
                return
        print(answer, flush=True)


if __name__ == "__main__":
    main()
