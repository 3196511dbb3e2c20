"""Run the training command for start_up.py, record where its time goes, and exit after the first step.

    python scripts/benchmarks/timed_start.py PARTS.json BEGAN_AT [options of scripts/train_detr.py]

It wraps functions of the package with a clock. BEGAN_AT is the start of the complete command, from
`time.time()`.
"""

import time

ENTERED_AT = time.time()

import builtins  # noqa: E402  (every import counts)
import importlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from collections import defaultdict  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

FIRST_STEP = "first step"
IMPORTS = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pandas",
    "transformers",
    "timm",
    "accelerate",
    "matplotlib",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
)
PARTS = {
    "detr_dist.config.load_config": "configuration",
    "detr_dist.rendezvous.Rendezvous.check_in": "forming the group",
    "accelerate.PartialState.__init__": "forming the group",
    "accelerate.Accelerator.__init__": "forming the group",
    "detr_dist.data.coco.load_data": "reading data",
    "detr_dist.models.build.build_detector": "building the network",
    "detr_dist.models.build._check_forward": "trying the network",
    "detr_dist.training.optim.build_optimizer": "optimizer",
    "accelerate.Accelerator.prepare": "optimizer",
    "detr_dist.tracking.store.open_client": "opening MLflow's store",
    "detr_dist.tracking.mlflow.MLflowTracker.__init__": "beginning the MLflow run",
    "detr_dist.tracking.mlflow.MLflowTracker.open": "opening the outbox",
    "torch.utils.data.DataLoader.__iter__": "starting loader processes",
    "detr_dist.training.groups.GroupStream.__next__": "first batch",
    "detr_dist.training.loop.train_step": FIRST_STEP,
}


class Clock:
    """The seconds of each part, without nested parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside_s = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began_at = time.perf_counter()
        self._inside_s.append(0.0)
        try:
            yield
        finally:
            took_s = time.perf_counter() - began_at
            self.seconds[name] += took_s - self._inside_s.pop()
            self._inside_s[-1] += took_s

    def around(self, name: str, function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                result = function(*arguments, **options)
            then()
            return result

        return timed


def time_imports(clock: Clock) -> None:
    """Attribute each first import to the library that imported it."""
    real_import, main_thread = builtins.__import__, threading.get_ident()

    def timed_import(name: str, *rest: Any, **options: Any) -> Any:
        library = name if name in IMPORTS else name.partition(".")[0]
        if library in sys.modules or library not in IMPORTS or threading.get_ident() != main_thread:
            return real_import(name, *rest, **options)
        with clock.part(f"import {library}"):
            return real_import(name, *rest, **options)

    builtins.__import__ = timed_import


def time_parts(clock: Clock, at_the_end: Callable[[], None]) -> None:
    """Replace the functions, including where other modules have imported them."""
    for path, part in PARTS.items():
        owner, name = _owner_of(path)
        real = getattr(owner, name)
        timed = clock.around(part, real, at_the_end if part == FIRST_STEP else lambda: None)
        holders = [
            owner,
            *(m for m in list(sys.modules.values()) if m and m.__name__.startswith("detr_dist")),
        ]
        for holder in holders:
            if vars(holder).get(name) is real:
                setattr(holder, name, timed)


def _owner_of(path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    try:
        return importlib.import_module(parent), name
    except ModuleNotFoundError:  # a class
        module, _, class_name = parent.rpartition(".")
        return getattr(importlib.import_module(module), class_name), name


def main() -> None:
    parts_path, began_at, *arguments = sys.argv[1:]
    clock = Clock()

    def leave() -> None:
        clock.seconds["launcher"] = ENTERED_AT - float(began_at)
        clock.seconds["the rest"] = time.time() - float(began_at) - sum(clock.seconds.values())
        Path(parts_path).write_text(json.dumps(clock.seconds), encoding="utf-8")
        raise KeyboardInterrupt

    sys.argv = ["scripts/train_detr.py", *arguments]
    time_imports(clock)
    with clock.part("import detr_dist, others"):
        cli = importlib.import_module("detr_dist.cli")
        importlib.import_module("detr_dist.training.trainer")  # as the command does after parsing its options
    time_parts(clock, leave)
    cli.main(["train", *arguments])


if __name__ == "__main__":
    main()
