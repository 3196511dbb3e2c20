"""The command line: help, usage errors, generated data."""

import os
import shlex
import subprocess
import sys

import pytest

from detr_dist.cli import main
from detr_dist.errors import StopRequested


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train"], "--train-dir"),
        (["trian"], "train"),
        (["make-data"], "see detr-dist make-data --help"),
        (["make-data", "x", "--num-train", "many"], "'--num-train'"),
        (["make-data", "x", "--num-train", "0"], "0"),
        (["make-data", "x", "--size", "1280"], "--size is 1280: give WIDTHxHEIGHT"),
        (["make-data", "x", "--ball-px", "6"], "'--ball-px' requires 2 arguments"),
    ],
)
def test_wrong_usage_prints_one_line_and_exits_with_2(capsys, arguments: list[str], hint: str) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert hint in error


TRAIN = {"--train-dir": "a", "--val-dir": "b", "--output-dir": "c"}
COMMANDS = {
    "train": TRAIN | {"--config": "x", "--resume": "x", "--init-from": "x"},
    "evaluate": {"--model": "m", "--data-dir": "d", "--predictions": "p", "--report": "r", "--pictures": "q"},
    "predict": {"--model": "m", "--input": "i", "--output-dir": "o"},
    "errors": {"--model": "m", "--data-dir": "d", "--output-dir": "o"},
    "export": {"--model": "m", "--output-dir": "o", "--register-as": "n", "--alias": "a"},
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in COMMANDS for option in COMMANDS[command]]
)
def test_an_empty_option_is_refused_with_its_name(
    capsys, tmp_path, monkeypatch: pytest.MonkeyPatch, command: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [each for other, value in COMMANDS[command].items() if other != option for each in (other, value)]
    for empty in ([option, ""], [f"{option}="], [option, " "]):
        code, _, error = run(capsys, command, *given, *empty)
        assert code == 2
        assert error.startswith(f"error: {option} is empty")
        assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["make-data", "check-data", "convert", "split", "sync", "prune"])
def test_an_empty_argument_is_refused(capsys, tmp_path, monkeypatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, command, "")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "empty" in error
    assert list(tmp_path.iterdir()) == []


def test_a_closed_output_pipe_is_no_error(tmp_path) -> None:
    detr_dist = shlex.join([sys.executable, "-m", "detr_dist"])
    commands = (
        "--help",
        "train --help",
        "make-data data --num-train 2 --num-val 2",
        "check-data data/train data/val",
    )
    script = "".join(f"{{ sleep 0.05; {detr_dist} {each}; echo $? >>codes; }} | true\n" for each in commands)
    finished = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    assert finished.stderr == ""
    assert (tmp_path / "codes").read_text().split() == ["0"] * len(commands)
    assert len(list((tmp_path / "data" / "train").glob("*.jpg"))) == 2


def test_without_arguments_the_help_is_shown(capsys) -> None:
    code, out, error = run(capsys)
    assert "make-data" in out
    assert code == 2
    assert error == ""


def test_the_help_of_train_lists_the_configuration_keys(capsys) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "training.gradient_accumulation_steps" in out
    assert "MLFLOW_TRACKING_URI" in out


def test_debug_also_shows_the_traceback(capsys, tmp_path) -> None:
    _, _, error = run(capsys, "make-data", str(tmp_path), "--num-val", "0", "--debug")
    assert "Traceback" in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_an_interrupt_exits_with_an_error_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detr_dist.cli.load_config", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--train-dir", "a", "--val-dir", "b", "--output-dir", "c"])
    assert exit_.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_stopped_run_is_reported_once_and_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise StopRequested("asked to stop at step 3: saved")

    monkeypatch.setattr("detr_dist.cli.load_config", stopped)
    for rank, expected in (("0", "asked to stop at step 3: saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        code, _, error = run(capsys, "train", "--train-dir", "a", "--val-dir", "b", "--output-dir", "c")
        assert (code, error) == (75, expected)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebook_matplotlib_backend_does_not_break_drawing(backend: str) -> None:
    command = "from detr_dist.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    draw = "from detr_dist.evaluation.plots import figure_style\nwith figure_style(): pass"
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", command + draw], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
