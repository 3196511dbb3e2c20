"""The inputs of a step of gpu_check.py, and its results on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


class Skipped(Exception):
    """A step cannot run on this host, for the given reason."""


@dataclass(frozen=True)
class Check:
    """A step. Its results are written at once, so that a crash or a time limit loses none of them."""

    name: str
    repository: Path
    out: Path
    on_gpu: bool

    @property
    def path(self) -> Path:
        """Return the path of the results, one JSON object per line."""
        return self.out / f"{self.name}.jsonl"

    def sized(self, on_gpu: int, on_cpu: int) -> int:
        """Return the size for this device."""
        return on_gpu if self.on_gpu else on_cpu

    def figures(self, **values: Any) -> None:
        """Report measured values by name."""
        self._write(values)

    def expect(self, is_so: bool, failure: str) -> None:
        """Report a failure with its reason unless `is_so`. The step continues."""
        if not is_so:
            self._write({"failed": failure})

    def expect_on_gpu(self, is_so: bool, failure: str) -> None:
        """Report a failure on a GPU only: speed proves nothing at the reduced size of the CPU."""
        self.expect(is_so or not self.on_gpu, failure)

    def needs_gpu(self, reason: str) -> None:
        """Skip the rest of the step without a GPU."""
        if not self.on_gpu:
            self.skip(f"no GPU: {reason}")

    def skip(self, reason: str) -> NoReturn:
        raise Skipped(reason)

    def figures_of(self, step: str) -> dict[str, Any]:
        """Return the values of an earlier step, or an empty mapping if it did not run."""
        return read_findings(self.out / f"{step}.jsonl").figures

    def _write(self, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            print(json.dumps(values), file=file, flush=True)


@dataclass(frozen=True)
class Findings:
    """The results of a step so far."""

    figures: dict[str, Any]
    failures: list[str]


def read_findings(path: Path) -> Findings:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    figures = {name: value for line in lines for name, value in line.items() if name != "failed"}
    return Findings(figures, [line["failed"] for line in lines if "failed" in line])
