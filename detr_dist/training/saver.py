"""Checkpoints are written and uploaded in the background: training waits for a copy to the host only."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from detr_dist.errors import TrainingError
from detr_dist.training.checkpoint import UNREADABLE, Snapshot, claimed_age, write_checkpoint
from detr_dist.training.durable import failure_on_disk, finish_interrupted, remove_folder


class CheckpointSaver:
    """Writes one checkpoint at a time to `checkpoints_dir`, prunes the old ones, uploads. Main process only.

    A checkpoint that cannot be written or uploaded is one line on the screen, and training goes on: those
    written before are as they were. `finish` is strict about `best` and `last`.
    """

    def __init__(
        self,
        checkpoints_dir: Path,
        *,
        keep_last: int | None,
        upload: Callable[[Path, str], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._keep_last = keep_last
        self._upload = upload
        self._say = say
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures: dict[str, str] = {}  # by name, of what every run shall have at its end
        finish_interrupted(checkpoints_dir)

    def save(self, take: Callable[[], Snapshot], names: Sequence[str]) -> None:
        """Write what `take` returns under each of `names`. Waits until the one before is written, so that
        there is one copy in memory at most."""
        self.wait()
        self._pending = self._thread.submit(self._save, take(), names)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is not None:
            self._pending.result()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            TrainingError: `best` or `last` could not be.
        """
        self.wait()
        for failure in self._failures.values():
            raise TrainingError(failure)

    def close(self) -> None:
        """End the thread, once it has done what it was given."""
        self._thread.shutdown()

    def _save(self, snapshot: Snapshot, names: Sequence[str]) -> None:
        folders = ", ".join(str(self._checkpoints_dir / name) for name in names)
        try:
            write_checkpoint(self._checkpoints_dir, names, snapshot)
            for name in names:
                self._failures.pop(name, None)
        except Exception as error:  # OSError mostly, but safetensors and torch wrap it in their own
            failure = (
                f"{folders}: the checkpoint of step {snapshot.document['step']} could not be written "
                f"({failure_on_disk(error, self._checkpoints_dir)}); the earlier ones are intact"
            )
            self._failures |= {name: failure for name in names if name in ("best", "last")}
            self._say(f"warning: {failure}, and training goes on; make room for the next one")
            return
        try:
            self._prune()
        except OSError as error:
            self._say(f"warning: {self._checkpoints_dir}: an old checkpoint cannot be deleted ({error})")
        if self._upload is not None:
            try:
                self._upload_all(names)
            except Exception as error:  # each kind of store raises its own
                self._say(
                    f"warning: {folders}: not uploaded ({failure_on_disk(error, self._checkpoints_dir)})"
                )

    def _upload_all(self, names: Sequence[str]) -> None:
        """All but step_<N>, of which there may be thousands."""
        assert self._upload is not None
        names = [name for name in names if not name.startswith("step_")]
        if names == ["last"]:  # an upload that is cut short must not spoil the only copy there is
            self._upload(self._checkpoints_dir / "last", "checkpoints/last_copy")
        for name in names:
            self._upload(self._checkpoints_dir / name, f"checkpoints/{name}")

    def _prune(self) -> None:
        """Delete the oldest epoch_<N> and step_<N>, and first those that are damaged. `best` and `last` keep
        their files, and the newest stays."""
        if self._keep_last is None:
            return
        numbered = [
            path for path in self._checkpoints_dir.iterdir() if re.fullmatch(r"(epoch|step)_\d+", path.name)
        ]
        ages = {path: claimed_age(path) for path in numbered}
        numbered.sort(key=lambda path: (ages[path] != UNREADABLE, ages[path]))
        for folder in numbered[: -self._keep_last]:
            remove_folder(folder)
