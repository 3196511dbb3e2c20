"""The imports between folders of the package, and the libraries that a quick start does not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import detr_dist

PACKAGE = Path(detr_dist.__file__).parent
REPOSITORY = Path(__file__).parents[2]

# A room is a folder or a module directly under detr_dist. It may import itself and the rooms named here.
BASE = {
    "boxes",
    "config",
    "config_tiles",
    "config_types",
    "errors",
    "extensions",
    "progress_bar",
    "redaction",
    "resize",
    "serving",
    "storage",
    "text",
}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {
        "config",
        "errors",
        "evaluation",
        "extensions",
        "inference",
        "training",
        "tracking",
        "models",
    },
    "__main__": {"cli"},
    "cli": BASE
    | {
        "console",
        "data",
        "data_commands",
        "distributed",
        "evaluation",
        "inference",
        "models",
        "tracking",
        "training",
    },
    "data_commands": {"data", "models"},
    "inference": BASE
    | {"data", "distributed", "environment", "evaluation", "models", "numerics", "tracking", "training"},
    "training": BASE | {"data", "distributed", "environment", "evaluation", "models", "numerics", "tracking"},
    "evaluation": BASE | {"data", "distributed", "models", "numerics"},
    "tracking": BASE | {"console", "data", "distributed", "models"},
    "models": BASE,
    "data": BASE,
    "distributed": {"config", "environment", "errors", "rendezvous", "text"},
    "numerics": {"config", "distributed", "environment"},
    "serving": set(),
    "environment": {"errors"},
    "rendezvous": {"environment", "errors"},
    "config": {
        "config_data",
        "config_text",
        "config_tiles",
        "config_training",
        "config_types",
        "errors",
        "redaction",
    },
    "config_data": {"config_tiles", "config_types"},
    "config_text": {"errors"},
    "config_tiles": {"config_text", "config_types", "serving"},
    "config_training": {"config_types"},
    "config_types": {"errors", "extensions", "redaction", "serving"},
    "boxes": {"serving"},
    "console": {"errors", "progress_bar", "redaction"},
    "progress_bar": set(),
    "errors": {"redaction", "text"},
    "extensions": {"errors"},
    "redaction": set(),
    "resize": {"config", "serving"},
    "storage": {"errors", "text"},
    "text": {"redaction"},
}

# Libraries that only these rooms may know.
CONFINED_LIBRARIES = {"accelerate", "mlflow", "pycocotools"}
ROOMS_OF_THE_CONFINED = {"distributed", "evaluation", "serving", "tracking", "training"}

# Slow to import: none of them may be loaded for a help page or for reading a configuration.
SLOW_LIBRARIES = {"accelerate", "mlflow", "numpy", "scipy", "timm", "torch", "torchvision", "transformers"}
NAMES_THAT_SAY_NOTHING = {"common", "helpers", "misc", "utils"}


def imported_by(path: Path, package: Path) -> Iterator[str]:
    """Return full names of all imports of a module, in its functions too; `from a import b` gives `a.b`."""
    own_package = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = own_package[: len(own_package) - node.level + 1] if node.level else []
            module = [*parents, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def violations(package: Path) -> list[str]:
    """Return one line for each import that the rules above forbid."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        room = where.parts[0].removesuffix(".py")
        for name in imported_by(path, package):
            library, _, inner = name.partition(".")
            target = inner.partition(".")[0]
            if library in CONFINED_LIBRARIES and room not in ROOMS_OF_THE_CONFINED:
                found.append(f"{where} imports {library}")
            elif (
                library == package.name
                and target in MAY_IMPORT
                and target not in {room, *MAY_IMPORT.get(room, ())}
            ):
                found.append(f"{where} imports {target}")
    return found


def modules_loaded_by(*arguments: str) -> set[str]:
    """Return top-level names of all that a fresh Python imports to run the arguments, which must succeed."""
    command = [sys.executable, "-X", "importtime", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    lines = finished.stderr.splitlines()
    report = [line for line in lines if line.startswith("import time:")]
    assert finished.returncode == 0, "\n".join(line for line in lines if line not in report)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in report}


def test_imports_follow_the_layers() -> None:
    assert violations(PACKAGE) == []


def test_the_modules_copied_into_models_import_each_other_relatively() -> None:
    for path in sorted((PACKAGE / "serving").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names, level = [node.module or ""], node.level
                assert level <= 1, f"{path.name} imports from outside its folder"
            assert not any(name.startswith("detr_dist") for name in names), path.name


def test_every_folder_has_an_import_rule() -> None:
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert rooms - {"__init__", "__pycache__", "py.typed"} <= MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("module", "statement", "complaint"),
    [
        ("models/matcher.py", "from detr_dist.data.dataset import Batch", "models/matcher.py imports data"),
        ("models/matcher.py", "from ..data import dataset", "models/matcher.py imports data"),
        ("models/matcher.py", "from detr_dist import training", "models/matcher.py imports training"),
        ("boxes.py", "def area():\n    from . import config", "boxes.py imports config"),
        ("data/coco.py", "import pycocotools.coco", "data/coco.py imports pycocotools"),
        ("cli.py", "import mlflow", "cli.py imports mlflow"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, module: str, statement: str, complaint: str) -> None:
    path = tmp_path / "detr_dist" / module
    path.parent.mkdir(parents=True)
    path.write_text(statement, encoding="utf-8")
    assert violations(tmp_path / "detr_dist") == [complaint]


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "detr_dist" / "models" / "matcher.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch\nfrom detr_dist import __version__, boxes\nfrom .criterion import x", encoding="utf-8"
    )
    assert violations(tmp_path / "detr_dist") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import detr_dist.config"),
        ("-m", "detr_dist", "--help"),
        ("-m", "detr_dist", "train", "--help"),
        ("-m", "detr_dist", "check-data", "--help"),
        ("-m", "detr_dist", "convert", "--help"),
        ("-m", "detr_dist", "evaluate", "--help"),
        ("-m", "detr_dist", "predict", "--help"),
        ("-m", "detr_dist", "errors", "--help"),
        ("-m", "detr_dist", "export", "--help"),
    ],
    ids=" ".join,
)
def test_reading_a_configuration_or_a_help_page_loads_nothing_slow(arguments: tuple[str, ...]) -> None:
    loaded = modules_loaded_by(*arguments)
    assert "detr_dist" in loaded
    assert loaded & SLOW_LIBRARIES == set()


def test_no_module_has_a_meaningless_name() -> None:
    python_files = [
        *PACKAGE.rglob("*.py"),
        *(REPOSITORY / "scripts").rglob("*.py"),
        *(REPOSITORY / "tests").rglob("*.py"),
    ]
    names = {part.removesuffix(".py") for path in python_files for part in path.relative_to(REPOSITORY).parts}
    assert names & NAMES_THAT_SAY_NOTHING == set()
