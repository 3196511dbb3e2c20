"""Make the images of the README from the quickstart's run: detections, and the run in MLflow.

Run `bash scripts/quickstart.sh` first. Needs Chromium and the packages of `pip install -e '.[dev]'`.
"""

import json
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

import detr_dist as dd

REPOSITORY = Path(__file__).parents[1]
IMAGES = REPOSITORY / "docs" / "images"
MODEL = REPOSITORY / "models" / "quickstart"
METRICS = "^train_loss$|^val_(player_|ball_)?map$|^val_f1$|^learning_rate$"
SCENES = REPOSITORY / "datasets" / "quickstart" / "val"


def draw_detections(num_scenes: int = 2) -> None:
    """Draw what the model finds in the first validation scenes that have a ball, side by side."""
    model = dd.load_model(MODEL / "model")
    drawn = []
    for path in sorted(SCENES.glob("*.jpg")):
        found = model.predict(path)
        if "ball" in found.names:
            drawn.append(np.asarray(found.draw(Image.open(path)).resize((640, 400))))
        if len(drawn) == num_scenes:
            break
    Image.fromarray(np.concatenate(drawn, axis=1)).save(IMAGES / "detections.jpg", quality=85)


def show_mlflow() -> None:
    """Take a screenshot of the run's metrics in MLflow's own pages."""
    run = json.loads((MODEL / "results.json").read_text(encoding="utf-8"))
    server = subprocess.Popen(
        ["bash", "scripts/start_mlflow_ui.sh", run["tracking_uri"], "--port", "5055"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    try:
        address = next(m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        experiment = experiment_of(run["tracking_uri"], run["run_id"])
        wait_until_served(address)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1300, "height": 985})
            run_page = f"{address}/#/experiments/{experiment}/runs/{run['run_id']}/model-metrics"
            page.goto(f"{run_page}?workflowType=machine_learning")
            page.get_by_role("button", name="Close", exact=True).click()  # the assistant
            page.get_by_placeholder("Search metric charts").fill(METRICS)
            page.wait_for_timeout(6000)  # until the curves are drawn
            page.screenshot(path=IMAGES / "mlflow.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_until_served(address: str, limit_s: float = 60.0) -> None:
    """Return when the server answers."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{address} does not answer")


def experiment_of(tracking_uri: str, run_id: str) -> str:
    """Return the id of the run's experiment."""
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri).get_run(run_id).info.experiment_id)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw_detections()
    show_mlflow()
