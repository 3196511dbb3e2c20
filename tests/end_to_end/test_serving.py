"""`mlflow models serve`, in an environment without this package, answers what `detr-dist predict` writes."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from harness.commands import clean_environment, free_port
from PIL import Image

LIMIT_S = 120


def write_images(folder: Path) -> list[Path]:
    """Write images of several kinds, each of other proportions, so that none share a batch."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (90, 120, 4), dtype=np.uint8)
    rotation = Image.Exif()
    rotation[0x0112] = 6
    Image.fromarray(rgb[:60, :, 0]).save(folder / "grey.png")
    Image.fromarray(rgb[:70]).save(folder / "rgba.png")
    Image.fromarray(rgb[:80, :, 0].astype(np.uint16) * 257).save(folder / "sixteen_bits.png")
    Image.fromarray(rgb[:50, :, :3]).save(folder / "rotated.jpg", exif=rotation)
    Image.fromarray(rgb[:40, :, :3]).convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(rgb[..., :3]).convert("P").save(folder / "palette.gif")
    Image.fromarray(rgb[..., :3]).resize((3840, 2160)).save(folder / "large.jpg")
    return sorted(folder.iterdir())


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment with the installed libraries, in which this package cannot be imported."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    installed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site_packages,) = folder.glob("lib/python*/site-packages")
    lines = [*installed, "import sys; sys.modules['detr_dist'] = None"]
    (site_packages / "libraries.pth").write_text("\n".join(lines))
    uvicorn = folder / "bin" / "uvicorn"  # MLflow starts it by name
    uvicorn.write_text(f"#!{folder / 'bin' / 'python'}\nfrom uvicorn.main import main\nmain()\n")
    uvicorn.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, new_workplace: Callable, tiny_data: Path):
    place = new_workplace(tmp_path_factory.mktemp("trained"))
    finished = place.train(tiny_data, "training.max_steps=1")
    assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture(scope="module")
def server(trained, environment: Path) -> Iterator[str]:
    """Serve the best model of the run, and return the server's address."""
    python = environment / "bin" / "python"
    absent = subprocess.run([python, "-c", "import detr_dist"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in absent.stderr
    port, log = free_port(), trained.folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(
                    python,
                    "-m",
                    "mlflow",
                    "models",
                    "serve",
                    "-m",
                    f"runs:/{trained.results()['run_id']}/model",
                ),
                *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
            ],
            cwd=trained.folder,
            env=clean_environment()
            | {
                "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db",
                "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
                "HF_HUB_OFFLINE": "1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + LIMIT_S
    try:
        while not answers(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def ask(address: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return status and content of the answer to a request."""
    body = urllib.request.Request(
        f"{address}/invocations", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(body, timeout=LIMIT_S) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_server_without_this_package_returns_what_predict_returns(trained, server: str) -> None:
    paths = write_images(trained.folder / "images")
    finished = trained.run(
        *("predict", "--model", "out/model", "--input", "images", "--output-dir", "found", "--threshold", "0")
    )
    assert finished.returncode == 0, finished.stderr
    expected: dict[str, list] = {path.name: [] for path in paths}
    for each in json.loads((trained.folder / "found" / "predictions.json").read_text()):
        expected[each["file_name"]].append((each["category_name"], each["score"], each["bbox"]))
    assert all(expected.values())
    texts, params = [base64_of(path) for path in paths], {"threshold": 0}
    answered = []
    for request in (
        {"inputs": {"image": texts}},
        {"dataframe_split": {"columns": ["image"], "data": [[each] for each in texts]}},
    ):
        status, answer = ask(server, request | {"params": params})
        assert status == 200, answer
        answered.append(answer["predictions"])
    alone = [ask(server, {"inputs": {"image": [each]}, "params": params})[1]["predictions"] for each in texts]
    answered.append([row for rows in alone for row in rows])
    for rows in answered:
        for path, row in zip(paths, rows, strict=True):
            found = []
            for each in row["detections"]:
                left, top, right, bottom = each["box"]
                found.append((each["label"], each["score"], [left, top, right - left, bottom - top]))
            assert found == expected[path.name], path.name
    example = json.loads((trained.folder / "out" / "model" / "serving_input_example.json").read_text())
    assert ask(server, example)[0] == 200


@pytest.mark.slow
def test_a_server_refuses_malformed_requests_and_names_the_image(trained, server: str) -> None:
    path = trained.folder / "good.png"
    Image.effect_noise((64, 48), 50).save(path)
    good, no_image = base64_of(path), base64.b64encode(b"no image").decode()
    for bad in ("###", no_image, good[: len(good) // 8 * 4], str(path), 7, None):
        status, answer = ask(server, {"dataframe_records": [{"image": good}, {"image": bad}]})
        assert status == 400, answer
        assert "image 1: " in answer["message"], answer
        assert "image 0" not in answer["message"]
        assert len(answer["message"]) < 200, "the images are in the message"
    status, answer = ask(server, {"inputs": {"image": [good]}, "params": {"threshold": 2}})
    assert (status, "threshold 2" in answer["message"]) == (400, True)
    status, answer = ask(server, {"inputs": {"image": [good]}})
    assert status == 200
