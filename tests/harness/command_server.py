"""Run `detr-dist` commands, each in its own process that is forked from this one.

Importing what a command needs takes ten seconds, forking a process that has imported it almost none. Reads
one request per line as JSON: either what to start, answered with its process id, or the process id to wait
for, answered with its exit code (negative for a signal).
"""

import atexit
import gc
import importlib
import json
import logging
import os
import sys
from typing import Any

from detr_dist.cli import main as run_command
from detr_dist.extensions import FAMILIES

IMPORTS = (
    "detr_dist.inference.evaluate",
    "detr_dist.inference.export",
    "detr_dist.inference.predict",
    "detr_dist.tracking.mlflow",
    "detr_dist.training.trainer",
    # What libraries import only when it is used.
    "alembic.command",
    "deepspeed",
    "mlflow.pytorch",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "sqlalchemy.dialects.sqlite",
    "torch.utils.tensorboard",
    "transformers.models.resnet.modeling_resnet",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES.built_in),
)
"""Imports that are worth sharing."""


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


def run(arguments: list[str], codes: list[int]) -> None:
    """Run a command and add its exit code to `codes`."""
    sys.argv = ["detr-dist", *arguments]
    try:
        run_command(arguments)
        codes.append(0)
    except SystemExit as error:
        if isinstance(error.code, int):
            codes.append(error.code)
        raise


def leave(codes: list[int]) -> None:
    """Exit with the code of the command that has ended, if any, without freeing the memory.

    After a fork that would first copy it, which takes a second.
    """
    if codes:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def main() -> None:
    codes: list[int] = []
    atexit.register(leave, codes)  # the first one registered is the last one called: all threads have ended
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed prints while it is imported
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the memory of all objects
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        else:
            answer = start(request)
            if answer == 0:
                run(request["arguments"], codes)
                return
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
