"""What a step of gpu_check.py has to work with, and where it writes what it found."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


class Skipped(Exception):
    """A step cannot be run here, for the reason given."""


@dataclass(frozen=True)
class Check:
    """One step. What it reports is on disk at once, so that a crash or a time limit loses none of it."""

    name: str
    repository: Path
    out: Path
    on_gpu: bool

    @property
    def path(self) -> Path:
        """Of what the step reports, one JSON object a line."""
        return self.out / f"{self.name}.jsonl"

    def sized(self, on_gpu: int, on_cpu: int) -> int:
        """Return the one for this device."""
        return on_gpu if self.on_gpu else on_cpu

    def figures(self, **values: Any) -> None:
        """Report measured values by their names."""
        self._write(values)

    def expect(self, is_so: bool, failure: str) -> None:
        """Report that the step failed, with the reason, unless it `is_so`. The step continues."""
        if not is_so:
            self._write({"failed": failure})

    def expect_on_gpu(self, is_so: bool, failure: str) -> None:
        """The same for speed, which proves nothing at the reduced size of the CPU."""
        self.expect(is_so or not self.on_gpu, failure)

    def needs_gpu(self, reason: str) -> None:
        """Skip the rest of the step where there is no GPU."""
        if not self.on_gpu:
            self.skip(f"no GPU: {reason}")

    def skip(self, reason: str) -> NoReturn:
        raise Skipped(reason)

    def figures_of(self, step: str) -> dict[str, Any]:
        """Return what an earlier step measured; empty if it was not run."""
        return read_findings(self.out / f"{step}.jsonl").figures

    def _write(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            print(json.dumps(values), file=file, flush=True)


@dataclass(frozen=True)
class Findings:
    """What a step has reported so far."""

    figures: dict[str, Any]
    failures: list[str]


def read_findings(path: Path) -> Findings:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    figures = {name: value for line in lines for name, value in line.items() if name != "failed"}
    return Findings(figures, [line["failed"] for line in lines if "failed" in line])
