"""docs/extending.md as a reader follows it: each file is written and each command run unchanged."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from harness.commands import Workplace
from harness.data import TINY_CONFIG

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
HAS_STEPS = ("training.max_steps=2", "training.num_epochs=1", "logging.log_every_steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, new_workplace) -> Workplace:
    """Return a folder with generated scenes and a small configuration instead of the quickstart's."""
    place = new_workplace(tmp_path_factory.mktemp("extending"))
    config = TINY_CONFIG | {"model": TINY_CONFIG["model"] | {"num_queries": 60}}
    (place.folder / "configs").mkdir()
    (place.folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    introduction = PAGE.partition("\n## ")[0]
    (make_data,) = commands_in(introduction)
    made = place.run(*make_data)
    assert made.returncode == 0, made.stderr
    return place


def commands_in(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert all(command[0] == "detr-dist" for command in commands)
    return [command[1:] for command in commands]


def write_files(text: str, folder: Path) -> None:
    for name, code in re.findall(r"^```python\n# (\S+\.py)\n(.+?)^```", text, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(code, encoding="utf-8")


@pytest.mark.parametrize("title", SECTIONS)
def test_each_documented_extension_works_unchanged(place: Workplace, title: str) -> None:
    write_files(SECTIONS[title], place.folder)
    (command,) = commands_in(SECTIONS[title])
    output = Path(command[command.index("--output-dir") + 1])
    finished = place.run(*command, *HAS_STEPS)
    assert finished.returncode == 0, finished.stderr
    assert "warning" not in finished.stdout + finished.stderr, finished.stdout
    logged = dict(place.history("train_loss", str(output)))
    assert logged.keys() == {1, 2}
    match title:
        case "Add a loss term":
            assert all(loss > 0 for _, loss in place.history("train_loss_center", str(output)))
        case "Add a metric":
            assert 0 <= place.results(str(output))["metrics"]["val_center_recall"] <= 1
        case "Add a tracker":
            assert '"train_loss"' in (place.folder / "metrics.jsonl").read_text()
        case "Add a callback":
            assert re.search(r"^\w+ at step 2: [\d.]+ GiB left$", finished.stdout, re.MULTILINE)


def test_no_extension_needs_more_than_one_file() -> None:
    for title, text in SECTIONS.items():
        assert len(re.findall(r"^```python\n# \S+\.py\n", text, re.MULTILINE)) <= 1, title
