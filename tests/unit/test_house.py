"""Files that are shipped with the package: scripts, YAML files, metadata."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import detr_dist
from detr_dist.cli import app
from detr_dist.config import load_config

REPOSITORY = Path(__file__).parents[2]
SHIPPED_IN = (".ci", "accelerate_configs", "configs", "launch", "scripts")


def shipped(pattern: str) -> list[Path]:
    return sorted(path for folder in SHIPPED_IN for path in (REPOSITORY / folder).rglob(pattern))


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
YAML_FILES = [REPOSITORY / ".pre-commit-config.yaml", *shipped("*.yaml")]
SHELL_SCRIPTS = [REPOSITORY / ".ci" / "run", *shipped("*.sh"), *shipped("*.sbatch")]
SETTINGS_IN_BASH = shipped("*.env.example")


def shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def tool(name: str) -> str:
    """Return the path of a development tool, in any environment; skip without it, in CI fail."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is not None:
        return found
    message = f"{name} is not installed: pip install -e '.[dev]'"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.mark.parametrize("path", YAML_FILES, ids=shown)
def test_every_shipped_yaml_file_holds_settings(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("path", [*SHELL_SCRIPTS, *SETTINGS_IN_BASH], ids=shown)
def test_every_shell_script_passes_shellcheck(path: Path) -> None:
    finished = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=shown)
def test_every_shell_script_is_executable_and_stops_at_its_first_error(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def test_pytest_collects_from_every_folder_of_tests(pytestconfig: pytest.Config) -> None:
    ignored = pytestconfig.getini("norecursedirs")  # by default also folders named dist or build
    folders = {folder for path in (REPOSITORY / "tests").rglob("test_*.py") for folder in path.parents}
    names = {folder.name for folder in folders if folder.is_relative_to(REPOSITORY / "tests")}
    assert {"unit", "dist", "launch", "end_to_end"} <= names
    assert [name for name in names if any(fnmatch(name, pattern) for pattern in ignored)] == []


def test_the_version_equals_the_installed_one() -> None:
    assert detr_dist.__version__ == version("detr_dist")


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(detr_dist.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    for target, _, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#([^)\s]+))?\)", page.read_text()):
        linked = (page.parent / target) if target else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in anchors, f"{target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_on_a_page_have_options_and_settings_that_exist(page: Path) -> None:
    text = "".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    for name, *arguments in [words[1:] for words in lines if words[:1] == ["detr-dist"]]:
        if "..." in arguments:
            continue
        given = get_command(app).commands[name].make_context(name, list(arguments)).params
        if given.get("config") is not None:
            config = load_config(REPOSITORY / given["config"], given.get("overrides") or ())
            assert config != load_config(None)


def test_the_map_of_the_readme_names_modules_that_exist() -> None:
    text = (REPOSITORY / "README.md").read_text().partition("The repository:")[2]
    names = {path.name for path in REPOSITORY.glob("*/**/*") if ".venv" not in path.parts}
    assert set(re.findall(r"\b\w+\.(?:py|sh|md|yaml)\b", text)) <= names | {"CONTRIBUTING.md", "CHANGELOG.md"}
