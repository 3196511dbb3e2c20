"""The command line: help, usage errors, generated data."""

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
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments: list[str], hint: str) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert hint in error


def test_without_arguments_the_help_is_shown(capsys) -> None:
    code, out, error = run(capsys)
    assert "make-data" in out
    assert code == 2
    assert error == ""


def test_the_help_of_train_lists_the_configuration_keys(capsys) -> None:
    code, out, _ = run(capsys, "train", "--help")
    assert code == 0
    assert "training.gradient_accumulation_steps" in out


def test_debug_shows_the_traceback_as_well(capsys, tmp_path) -> None:
    _, _, error = run(capsys, "make-data", str(tmp_path), "--num-val", "0", "--debug")
    assert "Traceback" in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_an_interrupt_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detr_dist.cli.load_config", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--train-dir", "a", "--val-dir", "b", "--output-dir", "c"])
    assert exit_.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_run_that_was_stopped_says_so_once_and_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise StopRequested("asked to stop at step 3: saved")

    monkeypatch.setattr("detr_dist.cli.load_config", stopped)
    for rank, said in (("0", "asked to stop at step 3: saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        code, _, error = run(capsys, "train", "--train-dir", "a", "--val-dir", "b", "--output-dir", "c")
        assert (code, error) == (75, said)
