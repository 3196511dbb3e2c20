"""Trackers other than MLflow's, and the log file of a run."""

import errno
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detr_dist.errors import StopRequested, TrainingError, UsageError
from detr_dist.tracking.tracker import OwnTracker, Status, TensorBoard, Tracker, Trackers, tracked

_logger = logging.getLogger("detr_dist.tests")


class Notebook(Tracker):
    """User's tracker that accepts no files but the log."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.files: dict[str, str] = {}
        self.ends: list[tuple[str, str | None]] = []

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= params

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_file(self, path: Path, artifact_path: str = "") -> None:
        self.files[f"{artifact_path}/{path.name}"] = path.read_text()

    def close(self, status: Status, error: str | None = None) -> None:
        self.ends.append((status, error))


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def forget_modules() -> Iterator[None]:
    """Remove the modules that a test imports from its own folder."""
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.fixture
def trackers(notebook: Notebook, tmp_path: Path) -> Trackers:
    trackers = Trackers()
    trackers.add(notebook)
    trackers.write_log(tmp_path / "logs" / "train.log")
    return trackers


def log_of(notebook: Notebook) -> str:
    return notebook.files["logs/train.log"]


def test_logged_values_reach_every_tracker(trackers: Trackers, notebook: Notebook, tmp_path: Path) -> None:
    trackers.add(TensorBoard(tmp_path / "tensorboard"))
    with tracked(trackers):
        trackers.log_params({"seed": 1})
        trackers.log_metrics({"train_loss": 0.5}, 3)
        trackers.log_folder(tmp_path, "model")
        trackers.keep_newest("models", 1, 1)
    assert notebook.params == {"seed": 1}
    assert notebook.metrics == [(3, {"train_loss": 0.5})]
    assert notebook.ends == [("FINISHED", None)]
    assert not trackers.keeps_files
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(3, 0.5)]


def test_images_and_tables_are_in_tensorboard(trackers: Trackers, tmp_path: Path) -> None:
    trackers.add(TensorBoard(tmp_path / "tensorboard"))
    Image.new("RGB", (20, 10), "red").save(tmp_path / "plot.png")
    with tracked(trackers):
        trackers.log_image(tmp_path / "plot.png", "val_plot", 4)
        trackers.log_table("per_class", ["class", "map"], [["a|b", 0.5], ["ball", None]], 4)
        trackers.log_evaluation({"val_map": 0.5}, 4, epoch=1)
        trackers.complete_model(1, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (image,) = events.Images("val_plot")
    assert (image.step, image.width, image.height) == (4, 20, 10)
    (text,) = events.Tensors("per_class/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines()[2:] == ["| a\\|b | 0.5000 |", "| ball |  |"]
    assert [event.value for event in events.Scalars("val_map")] == [0.5]


def test_a_resumed_run_hides_later_steps_in_tensorboard(tmp_path: Path) -> None:
    for first_step, steps, value in ((0, range(1, 6), 1.0), (3, range(4, 6), 2.0)):
        board = TensorBoard(tmp_path, first_step=first_step)
        for step in steps:
            board.log_metrics({"train_loss": value}, step)
        board.close("FINISHED")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)
    ]  # fmt: skip


def test_the_log_of_a_run_is_an_artifact_and_ends_with_the_run(
    trackers: Trackers, notebook: Notebook
) -> None:
    with tracked(trackers):
        _logger.info("step 1")
        _logger.warning("an image cannot be read at http://bob:s3cret@host")
    _logger.info("of another run")
    first, second = log_of(notebook).splitlines()
    assert first.endswith(" step 1")
    assert second.endswith(" warning: an image cannot be read at http://host")


def test_a_resumed_run_appends_to_its_log(trackers: Trackers, notebook: Notebook, tmp_path: Path) -> None:
    with tracked(trackers):
        _logger.info("first")
    resumed = Trackers()
    resumed.add(notebook)
    resumed.write_log(tmp_path / "logs" / "train.log")
    with tracked(resumed):
        _logger.info("second")
    assert [line.split()[-1] for line in log_of(notebook).splitlines()] == ["first", "second"]


def test_the_log_but_not_the_console_has_the_traceback_of_a_failed_run(
    trackers: Trackers, notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError), tracked(trackers):
        raise TrainingError("the loss is NaN")
    assert notebook.ends == [("FAILED", "TrainingError: the loss is NaN")]
    assert " error: TrainingError: the loss is NaN\nTraceback" in log_of(notebook)
    assert "NaN" not in capsys.readouterr().out


def test_the_log_of_a_stopped_run_states_that_it_was_stopped(trackers: Trackers, notebook: Notebook) -> None:
    with pytest.raises(StopRequested), tracked(trackers):
        raise StopRequested("SIGTERM: saved at step 5")
    assert notebook.ends == [("KILLED", None)]
    (line,) = log_of(notebook).splitlines()
    assert line.endswith(" SIGTERM: saved at step 5")


def test_the_first_of_two_threads_that_close_a_run_decides_its_status(
    trackers: Trackers, notebook: Notebook
) -> None:
    with tracked(trackers):
        trackers.close_after_loss("process 1 is lost")
    assert notebook.ends == [("FAILED", "process 1 is lost")]
    assert "error: process 1 is lost" in log_of(notebook)


class FullDisk(OwnTracker):
    """Tracker for whose output there is no space."""

    def _fail(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log_metrics = log_folder = close = _fail


class Broken(Tracker):
    """Tracker that raises in every method."""

    def _fail(self, *_: Any, **__: Any) -> None:
        raise KeyError("api_key")

    log_params = log_metrics = log_file = log_folder = close = _fail


def test_a_failing_builtin_tracker_is_an_error_and_the_others_are_closed(
    trackers: Trackers, notebook: Notebook
) -> None:
    trackers.add(FullDisk())
    with pytest.raises(OSError, match="No space"):
        trackers.log_metrics({"train_loss": 0.5}, 3)
    with pytest.raises(OSError, match="No space"):
        trackers.close("FINISHED")
    assert notebook.ends == [("FINISHED", None)]


def test_a_failing_user_tracker_is_one_warning(
    trackers: Trackers, notebook: Notebook, tmp_path: Path, messages: list[str]
) -> None:
    broken = Trackers()
    broken.add(Broken(), notebook, Broken())
    with tracked(broken):
        broken.log_params({"seed": 1})
        broken.log_metrics({"train_loss": 0.5}, 3)
        broken.log_folder(tmp_path, "model", last="weights")
    assert notebook.metrics == [(3, {"train_loss": 0.5})]
    assert notebook.ends == [("FINISHED", None)]
    assert len(messages) == 2, "one for each of the two"
    assert all("the tracker Broken failed (KeyError: 'api_key')" in warning for warning in messages)


IN_A_FILE = """
from pathlib import Path
import detr_dist as dd

class Folders(dd.Tracker):
    def log_folder(self, folder: Path, artifact_path: str) -> None:
        Path("kept").write_text(artifact_path)

class Demanding(Folders):
    def __init__(self, url: str) -> None: ...

class NoTracker: ...
"""


def test_a_tracker_is_loaded_by_file_and_class_and_may_accept_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "our_trackers.py").write_text(IN_A_FILE)
    trackers = Trackers()
    trackers.add(Notebook())
    assert not trackers.keeps_files
    trackers.add("our_trackers.py:Folders")
    assert trackers.keeps_files
    trackers.log_folder(tmp_path, "model", last="weights")
    assert (tmp_path / "kept").read_text() == "model"


@pytest.mark.parametrize(
    ("name", "reason"), [("Demanding", "url"), ("NoTracker", r"detr_dist\.Tracker"), ("Absent", "Absent")]
)
def test_a_class_that_creates_no_tracker_is_named_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "our_trackers.py").write_text(IN_A_FILE)
    with pytest.raises(UsageError, match=rf"logging\.trackers: .*{name}.*{reason}"):
        Trackers().add(f"our_trackers.py:{name}")
