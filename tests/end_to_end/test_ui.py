"""MLflow's pages of two training runs in a real Chromium, opened by scripts/start_mlflow_ui.sh.

Screenshots of the pages go to out/ui, or to the folder in DETR_DIST_TEST_OUTPUT.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "start_mlflow_ui.sh"
OUTPUT = Path(os.environ.get("DETR_DIST_TEST_OUTPUT", REPOSITORY / "out" / "ui"))
LEARNING_RATES = {"slow": "1e-3", "fast": "3e-3"}


def environment(**added: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return inherited | {"PATH": path} | added


def run_script(folder: Path, *arguments: str, **added: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env=environment(**added),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def served(folder: Path, *arguments: str, end: signal.Signals) -> Iterator[str]:
    """Yield the address that the script prints, once the pages respond.

    Then end the script with a signal, and check that it leaves no process.
    """
    log = folder / "ui.log"
    with log.open("w") as file:
        script = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=folder,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = wait_for(
            lambda: re.search(r"open (http://127\.0\.0\.1:\d+)", log.read_text()), script, log
        )[1]
        wait_for(lambda: answers(address), script, log)
        yield address
        processes = [psutil.Process(script.pid), *psutil.Process(script.pid).children(recursive=True)]
        script.send_signal(end)
        script.wait(30)
        _, left = psutil.wait_procs(processes, timeout=10)
        assert not left
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.wait()


def wait_for(condition: Callable[[], object], script: "subprocess.Popen[bytes]", log: Path):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert script.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def experiments(address: str) -> list[dict[str, str]]:
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/search?max_results=10") as answer:
        return list(json.load(answer)["experiments"])


def write_easy_data(folder: Path, num_images: int) -> None:
    """Write images with a bright square in one place, which a tiny network detects after 20 steps."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(num_images)
    images, annotations = [], []
    for i in range(num_images):
        pixels = rng.integers(0, 80, (80, 96, 3), dtype=np.uint8)
        pixels[20:60, 30:70] += 150
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 96})
        box = {"bbox": [30, 20, 40, 40], "area": 1600, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i, "category_id": 1, **box})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "player"}]}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, new_workplace):
    """Return a workplace with two finished training runs, each named after its output folder."""
    place = new_workplace(tmp_path_factory.mktemp("two_runs"))
    data = place.folder / "data"
    write_easy_data(data / "train", 40)
    write_easy_data(data / "val", 6)
    for name, learning_rate in LEARNING_RATES.items():
        finished = place.train(
            data,
            f"logging.mlflow_run_name={name}",
            f"training.learning_rate={learning_rate}",
            f"training.learning_rate_backbone={learning_rate}",
            "training.num_epochs=2",
            "evaluation.every_epochs=1",
            "checkpoint.every_epochs=1",
            output=name,
        )
        assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture(scope="module")
def ui(two_runs) -> Iterator[str]:
    """Return the address of the pages; another program occupies the requested port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with served(two_runs.folder, "--port", str(port), end=signal.SIGINT) as address:
            assert f"port {port} is busy" in (two_runs.folder / "ui.log").read_text()
            assert int(address.rpartition(":")[2]) > port
            yield address


def without(what: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium():
    """Return a page in a Chromium without access to the internet."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("playwright is not installed: pip install -e '.[dev]'")
    executable = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if executable is None:
        without("no Chromium: .ci/run installs it on Debian and Ubuntu (apt-get install chromium)")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[offline, *as_root])
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.set_default_timeout(20_000)
        yield page
        browser.close()


def links(before: str, path: Path, address: str) -> set[str]:
    """Return the links in a file that follow `before`, on the pages at `address`."""
    found = re.findall(rf"{before} http://127\.0\.0\.1:\d+(/#/\S+)", path.read_text())
    return {address + page for page in found}


def take_screenshot(page, name: str) -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)  # animations of menus and of the tree
    page.screenshot(path=OUTPUT / f"{name}.png")


def middle_of(element) -> float:
    """Return the vertical position of an element on the page, in pixels."""
    box = element.bounding_box()
    return float(box["y"] + box["height"] / 2)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_ui_compares_val_map_of_two_runs_and_lists_their_artifacts(two_runs, ui: str, chromium) -> None:
    page = chromium
    val_map = {name: two_runs.history("val_map", name)[-1][1] for name in LEARNING_RATES}
    assert len({0.0, *val_map.values()}) == 3, "values that cannot be told apart show nothing"

    (runs_page,) = links("open", two_runs.folder / "ui.log", ui)
    assert links("all runs, best first:", two_runs.folder / "fast" / "logs" / "train.log", ui) == {runs_page}
    page.goto(runs_page)
    # The assistant takes a quarter of the page.
    page.get_by_role("button", name="Close", exact=True).click()
    page.locator("[role=gridcell][col-id='metrics.`val_player_map`']").nth(1).wait_for()
    cells = page.locator("[role=gridcell][col-id='metrics.`val_map`']")
    cells.nth(1).wait_for()
    names = (
        page.locator("[role=gridcell][col-id='attributes.`Run Name`']").get_by_role("link").all_inner_texts()
    )
    # Rows come in one order in all parts of the table; MLflow may round what it shows.
    shown = dict(zip(names, map(float, cells.all_inner_texts()), strict=True))
    assert shown == pytest.approx(val_map, abs=0.001)
    assert [*shown.values()] == sorted(shown.values(), reverse=True)
    take_screenshot(page, "runs")

    page.get_by_role("checkbox", name="Select all runs").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    for name in val_map:
        page.get_by_text(name, exact=True).first.wait_for()
    take_screenshot(page, "compare")
    first = page.get_by_role("link", name="epoch", exact=True)
    first.scroll_into_view_if_needed()
    top = middle_of(first)
    page.mouse.move(first.bounding_box()["x"] + 700, top)
    row = page.get_by_role("link", name="val_map", exact=True)
    # The table shows 300 pixels at a time. In MLflow 3.17 its names scroll one wheel step late.
    while not (row.count() and middle_of(row) < top + 240):
        page.mouse.wheel(0, 10)
        page.wait_for_timeout(30)
    take_screenshot(page, "compare_metrics")
    for value in val_map.values():
        same_values = page.get_by_text(f"{value:.3g}", exact=True).all()
        assert any(abs(middle_of(each) - middle_of(row)) < 22 for each in same_values), "a row has 45 pixels"

    (run_page,) = links("this run:", two_runs.folder / "fast" / "logs" / "train.log", ui)
    page.goto(run_page)
    page.get_by_role("tab", name="System metrics").click()
    page.get_by_text("cpu_utilization_percentage", exact=True).first.wait_for()
    take_screenshot(page, "system_metrics")
    page.get_by_role("tab", name="Artifacts").click()
    for folder, content in (("checkpoints", ("best", "last")), ("model", ("MLmodel", "model.safetensors"))):
        page.get_by_label(folder, exact=True).click()
        for name in content:
            page.get_by_label(name, exact=True).wait_for()
    take_screenshot(page, "artifacts")


@pytest.mark.slow
def test_a_folder_is_served_and_termination_leaves_no_process(tmp_path: Path) -> None:
    experiment = tmp_path / "mlruns" / "7"
    experiment.mkdir(parents=True)
    written = {"experiment_id": "7", "name": "in_a_folder", "artifact_location": str(experiment)}
    (experiment / "meta.yaml").write_text(yaml.safe_dump(written | {"lifecycle_stage": "active"}))
    with served(tmp_path, "--port", "20500", end=signal.SIGTERM) as address:
        assert "in_a_folder" in {each["name"] for each in experiments(address)}


@pytest.mark.slow
def test_the_command_printed_after_training_opens_a_folder(workplace, tiny_data: Path) -> None:
    trained = workplace.train(tiny_data, "training.max_steps=1", "logging.mlflow_tracking_uri=file:./mlruns")
    assert trained.returncode == 0, trained.stderr
    (command,) = set(re.findall("^see it with: (.*)", trained.stdout, re.MULTILINE))  # at the start and end
    log = workplace.folder / "ui.log"
    with log.open("w") as file:
        pages = subprocess.Popen(
            ["bash", "-c", f"{command} --port 20600"],
            cwd=workplace.folder,
            env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answers("http://127.0.0.1:20600"), pages, log)
        assert "detr_training" in {each["name"] for each in experiments("http://127.0.0.1:20600")}
    finally:
        os.killpg(pages.pid, signal.SIGKILL)
        pages.wait()


@pytest.mark.parametrize(
    ("arguments", "added", "complaint"),
    [
        ((), {}, "no runs of MLflow in {folder}, neither in mlflow.db nor in mlruns"),
        (("sqlite:///away.db",), {}, "sqlite:///away.db: no runs of MLflow in {folder}/away.db"),
        ((), {"MLFLOW_TRACKING_URI": "file:./away"}, "MLFLOW_TRACKING_URI file:./away: no runs of MLflow"),
        (("http://127.0.0.1:9",), {}, "http://127.0.0.1:9: the MLflow server does not answer"),
    ],
    ids=["nothing here", "no database", "no folder", "no server"],
)
def test_with_nothing_to_show_one_error_is_printed_and_no_file_created(
    tmp_path: Path, arguments: tuple[str, ...], added: dict[str, str], complaint: str
) -> None:
    finished = run_script(tmp_path, *arguments, **added)
    assert finished.returncode != 0
    (line,) = finished.stderr.splitlines()
    assert complaint.format(folder=tmp_path) in line
    assert not list(tmp_path.iterdir())
