"""A real MLflow server that fails while a run is tracked there, and what it receives in the end."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForObjectDetection

STEPS, STEPS_PER_EPOCH = 120, 20
NUM_EPOCHS = STEPS // STEPS_PER_EPOCH
EVALUATED = [epoch for epoch in range(1, NUM_EPOCHS + 1) if epoch % 2 == 0]
CHECKPOINTS_OFTEN = (
    f"training.max_steps={STEPS}",
    "training.num_epochs=100",
    "training.batch_size=2",
    "evaluation.every_epochs=2",
    "evaluation.pictures=true",
    "checkpoint.every_epochs=2",
    "checkpoint.every_steps=5",
)


@pytest.fixture
def server(mlflow_server):
    """Return a running server, whatever the test before did to it."""
    mlflow_server.start()
    return mlflow_server


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until(condition: Callable[[], bool], process, workplace) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, workplace.log
        assert time.monotonic() < deadline, workplace.log
        time.sleep(0.01)


def records(workplace) -> list[dict]:
    """Return the records in the outbox of the run."""
    path = workplace.folder / "out" / "outbox" / tracked_run(workplace) / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def noted_losses(workplace) -> list[tuple[int, float]]:
    return [
        (record["step"], record["values"]["train_loss"])
        for record in records(workplace)
        if record["kind"] == "metrics" and "train_loss" in record["values"]
    ]


def tracked_run(workplace) -> str:
    (folder,) = (workplace.folder / "out" / "outbox").iterdir()
    return folder.name


@contextmanager
def frozen(process) -> Iterator[None]:
    """Suspend the run, so that the start-up time of a server does not matter."""
    started = psutil.Process(process.pid)
    started.suspend()
    try:
        yield
    finally:
        started.resume()


def start_and_cut_off(workplace, server, data: Path, *overrides: str):
    """Start a run and kill its server during training."""
    uri = f"logging.mlflow_tracking_uri={server.uri}"
    process = workplace.start(data, *CHECKPOINTS_OFTEN, uri, *overrides)
    outbox_dir = workplace.folder / "out" / "outbox"
    wait_until(lambda: bool(list(outbox_dir.glob("*"))), process, workplace)
    wait_until(lambda: server.num_steps(tracked_run(workplace)) >= 5, process, workplace)
    with frozen(process):
        server.kill()
    assert len(noted_losses(workplace)) < STEPS - 20, "the run is too far already to test anything"
    return process


def check_that_all_is_there(workplace, server, run_id: str, *, keep_last: int = NUM_EPOCHS) -> None:
    """Check for each step once, the checkpoints and models on disk, and the last epoch models."""
    assert server.client.get_run(run_id).info.status == "FINISHED"
    losses = server.losses(run_id)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert dict(losses) == dict(noted_losses(workplace))
    out = workplace.folder / "out"
    for folder in ("checkpoints/last", "checkpoints/best", "model"):
        assert server.files(run_id, folder) == content_of(out / folder), folder
    models = {each.path for each in server.client.list_artifacts(run_id, "models")}
    assert models == {f"models/epoch_{NUM_EPOCHS - age}" for age in range(keep_last)}
    assert "config.yaml" in {each.path for each in server.client.list_artifacts(run_id)}
    check_what_belongs_to_evaluations(server, run_id, keep_last=keep_last)
    assert not list((out / "outbox" / run_id / "files").iterdir())


def check_what_belongs_to_evaluations(server, run_id: str, *, keep_last: int) -> None:
    """Check for one LoggedModel for each epoch that is kept, one image for each step, table and note."""
    run = server.client.get_run(run_id)
    epochs = [epoch for epoch in EVALUATED if epoch > NUM_EPOCHS - keep_last]
    models = server.client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    assert sorted(each.name for each in models) == sorted(f"epoch_{epoch}" for epoch in epochs)
    assert {str(each.status) for each in models} == {"READY"}
    for each in models:
        scores = [metric.step for metric in each.metrics if metric.key == "val_map"]
        assert scores == [STEPS_PER_EPOCH * int(each.params["epoch"])], each.name
    outputs = [each.model_id for each in run.outputs.model_outputs]
    assert len(outputs) == len(set(outputs))
    names = [Path(each.path).name for each in server.client.list_artifacts(run_id, "images")]
    shown = [tuple(name.split("+")[:3:2]) for name in names if "+compressed" not in name]
    steps = [str(STEPS_PER_EPOCH * epoch) for epoch in EVALUATED]
    for key in ("val_confusion_matrix", "val_worst_images"):
        assert sorted(step for name, step in shown if name == key) == sorted(steps), key
    assert len(names) == 2 * len(shown)
    assert "train_batch" in {name for name, _ in shown}
    table = json.loads(Path(server.client.download_artifacts(run_id, "per_class.json")).read_text())
    assert {dict(zip(table["columns"], row, strict=True))["step"] for row in table["data"]} == {STEPS}
    assert "at step" in run.data.tags["mlflow.note.content"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_continues_in_an_outage_and_everything_is_delivered_once(
    workplace, server, tiny_data: Path
) -> None:
    process = start_and_cut_off(workplace, server, tiny_data)
    run_id = tracked_run(workplace)
    num_before = server.num_steps(run_id)
    wait_until(lambda: len(noted_losses(workplace)) >= num_before + 10, process, workplace)
    wait_until(lambda: "MLflow cannot be reached" in workplace.log, process, workplace)
    with frozen(process):
        assert server.num_steps(run_id) == num_before
        server.start()
    assert process.wait(90) == 0, workplace.log
    assert workplace.log.count("MLflow cannot be reached") == 1
    assert workplace.log.count("MLflow can be reached again") == 1
    assert "are not in MLflow yet" not in workplace.log
    assert workplace.results()["run_id"] == run_id
    check_that_all_is_there(workplace, server, run_id)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sync_delivers_the_queue_of_a_killed_run_and_a_resume_the_rest(
    workplace, server, tiny_data: Path
) -> None:
    process = start_and_cut_off(workplace, server, tiny_data)
    run_id = tracked_run(workplace)
    num_before = server.num_steps(run_id)
    waiting = workplace.folder / "out" / "outbox" / run_id / "files"
    wait_until(lambda: len(noted_losses(workplace)) >= num_before + 10, process, workplace)
    wait_until(lambda: bool(list(waiting.iterdir())), process, workplace)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    noted = noted_losses(workplace)

    in_vain = workplace.run("sync", "out")
    assert in_vain.returncode == 1
    assert "nothing is lost, try again" in in_vain.stderr
    assert server.num_steps(run_id) == num_before

    server.start()
    first = workplace.run("sync", "out")
    assert first.returncode == 0, first.stderr
    assert f"records delivered to MLflow run {run_id}" in first.stdout
    assert ": 0 records" not in first.stdout
    assert server.losses(run_id) == noted
    for record in records(workplace):
        if record["kind"] == "folder" and record["artifact_path"]:
            assert server.client.list_artifacts(run_id, record["artifact_path"]), record
    assert not list(waiting.iterdir())

    second = workplace.run("sync", "out")
    assert second.returncode == 0, second.stderr
    assert ": 0 records delivered" in second.stdout
    assert server.losses(run_id) == noted

    uri = f"logging.mlflow_tracking_uri={server.uri}"
    resumed = workplace.train(tiny_data, *CHECKPOINTS_OFTEN, uri, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert tracked_run(workplace) == run_id
    check_that_all_is_there(workplace, server, run_id)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_resume_from_a_copy_delivers_the_queue_of_the_killed_run(
    workplace, server, tiny_data: Path
) -> None:
    process = start_and_cut_off(workplace, server, tiny_data)
    run_id, num_before = tracked_run(workplace), len(noted_losses(workplace))
    copy = workplace.folder / "copy"
    wait_until((workplace.folder / "out" / "model").exists, process, workplace)
    num_later = max(num_before + 15, len(noted_losses(workplace)) + 3)  # not while the model is being queued
    wait_until(lambda: len(noted_losses(workplace)) >= num_later, process, workplace)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    for name in ("checkpoints", "model"):
        shutil.copytree(workplace.folder / "out" / name, copy / name)
    server.start()
    last_step = json.loads((copy / "checkpoints" / "last" / "state.json").read_text())["step"]
    assert server.num_steps(run_id) < last_step, "the server has already received everything"
    uri = f"logging.mlflow_tracking_uri={server.uri}"
    resumed = workplace.train(tiny_data, *CHECKPOINTS_OFTEN, uri, "--resume", "copy")
    assert resumed.returncode == 0, resumed.stderr
    assert "out held an earlier run: moved to out/earlier_runs" in resumed.stdout
    check_that_all_is_there(workplace, server, run_id)


def listening(port: int) -> socket.socket:
    """Listen on the port as soon as it is free: a killed server may take a moment to release it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def silent_server(port: int) -> Iterator[list[object]]:
    """Accept connections and never answer."""
    accepted: list[socket.socket] = []

    def accept(listener: socket.socket) -> None:
        while True:
            try:
                accepted.append(listener.accept()[0])
            except OSError:
                return

    with listening(port) as listener:
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        try:
            yield accepted
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for each in accepted:
                each.close()


@contextmanager
def failing_server(port: int) -> Iterator[list[object]]:
    """Answer 500 to every request."""
    asked: list[object] = []

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            self.send_error(500)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    listening(port).close()
    with ThreadingHTTPServer(("127.0.0.1", port), Answer) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("in_trouble", [silent_server, failing_server])
def test_a_failing_server_blocks_neither_training_nor_exit(
    workplace, server, tiny_data: Path, in_trouble
) -> None:
    process = start_and_cut_off(workplace, server, tiny_data, "checkpoint.keep_last=2")
    run_id = tracked_run(workplace)
    with in_trouble(server.port) as asked:
        assert process.wait(90) == 0, workplace.log
        assert asked
    assert len(noted_losses(workplace)) == STEPS
    assert "records are not in MLflow yet" in workplace.log
    assert "`detr-dist sync out` delivers them" in workplace.log
    assert server.num_steps(run_id) < STEPS

    server.start()
    finished = workplace.run("sync", workplace.folder / "out")
    assert finished.returncode == 0, finished.stderr
    check_that_all_is_there(workplace, server, run_id, keep_last=2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_resumes_while_its_server_is_unavailable(workplace, server, tiny_data: Path) -> None:
    process = start_and_cut_off(workplace, server, tiny_data)
    run_id = tracked_run(workplace)
    checkpoints_dir = workplace.folder / "out" / "checkpoints"
    wait_until(lambda: bool(list(checkpoints_dir.glob("[!.]*"))), process, workplace)  # one that is complete
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    uri = f"logging.mlflow_tracking_uri={server.uri}"
    resumed = workplace.start(tiny_data, *CHECKPOINTS_OFTEN, uri, "--resume", "auto")
    wait_until(lambda: len(noted_losses(workplace)) >= STEPS - 20, resumed, workplace)
    assert f"run {run_id} continues all the same" in workplace.log
    with frozen(resumed):
        second = workplace.train(tiny_data, *CHECKPOINTS_OFTEN, uri, "--resume", "auto")
        server.start()
    assert second.returncode == 1
    assert f"out: process {resumed.pid} on " in second.stderr
    assert resumed.wait(90) == 0, workplace.log
    check_that_all_is_there(workplace, server, run_id)
    assert server.client.get_run(run_id).data.tags["resumed_at_steps"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_passwords_are_stored_only_in_the_address_of_the_outbox(workplace, server, tiny_data: Path) -> None:
    uri = server.uri.replace("//", "//bob:s3cret%21@")
    report, val = ("--report", "report.json"), ("--data-dir", tiny_data / "val")
    tracked = f"logging.mlflow_tracking_uri={uri}"
    first = workplace.train(tiny_data, tracked, "training.max_steps=2", "logging.register_model_as=players")
    run_id = tracked_run(workplace)
    model = ("--model", f"runs:/{run_id}/model", "--tracking-uri", uri)
    workplace.config.write_text((workplace.folder / "out" / "config.yaml").read_text())
    finished = [
        first,
        workplace.run("export", *model, "--output-dir", "exported", "--register-as", "exported"),
        workplace.run("evaluate", *model, *val, *report),
        # The run's own settings have no password: the outbox brings it.
        workplace.train(tiny_data, "--resume", "auto", "training.max_steps=3"),
        workplace.run("sync", "out"),
    ]
    for command in finished:
        assert command.returncode == 0, command.stderr
    assert "changed since: logging" not in finished[-2].stdout
    failed = [
        workplace.run("evaluate", *model[:2], *val, "--tracking-uri", "http://bob:s3cret%21@127.0.0.1:1"),
        workplace.run("train", "mlflow_tracking_uri=" + uri),
        workplace.train(tiny_data, "model.config_overrides.hf_token=s3cret", output="refused"),
    ]
    assert [command.returncode for command in failed] == [2, 2, 2]
    assert "s3cret" not in "".join(each.stdout + each.stderr for each in finished + failed)

    files = [path for folder in (workplace.folder, server.folder) for path in folder.rglob("*")]
    holders = [path for path in files if path.is_file() and b"s3cret" in path.read_bytes()]
    assert holders == [workplace.folder / "out" / "outbox" / run_id / "run.json"]
    assert holders[0].stat().st_mode & 0o777 == 0o600
    tags = server.client.get_run(run_id).data.tags
    assert "/tiny.yaml" in tags["launch_command"]
    assert tags["resumed_at_steps"] == "2"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_is_found_under_any_name_of_its_folder(tmp_path: Path, new_workplace, tiny_data: Path) -> None:
    folder = tmp_path / "50%25 off? é #3"
    folder.mkdir()
    shutil.copytree(tiny_data, folder / "data")
    workplace, uri = new_workplace(folder), "sqlite:///mlflow.db?timeout=60"
    tracked, data = f"logging.mlflow_tracking_uri={uri}", Path("data")
    first = workplace.train(data, tracked, "training.max_steps=2")
    assert first.returncode == 0, first.stderr
    run_id = tracked_run(workplace)
    of_run = ("--model", run_id, "--tracking-uri", uri)
    evaluated = workplace.run("evaluate", *of_run, "--data-dir", data / "val")
    assert evaluated.returncode == 0, evaluated.stderr
    resumed = workplace.train(data, tracked, "training.max_steps=3", "--resume", run_id, output="second")
    assert "at step 2" in resumed.stdout, resumed.stderr
    assert resumed.returncode == 0, resumed.stderr

    address = json.loads((folder / "out" / "outbox" / run_id / "run.json").read_text())
    (train, _) = MlflowClient(address["tracking_uri"]).get_run(run_id).inputs.dataset_inputs
    source = mlflow.data.get_source(train.dataset).load()
    assert Path(source).read_bytes() == (folder / "data" / "train" / "_annotations.coco.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def with_variables(workplace, data: Path, *overrides: str, **variables: str):
    """Train with MLflow's variables set."""
    arguments = (*workplace._training(data, "out"), *overrides)
    finished = workplace.run(*arguments, environment=variables)
    assert finished.returncode == 0, finished.stderr
    return finished


def test_mlflow_variables_apply_until_a_run_is_resumed(workplace, tiny_data: Path, empty_store: Path) -> None:
    store = f"sqlite:///{shutil.copy(empty_store, workplace.folder / 'theirs.db')}"
    theirs = {"MLFLOW_EXPERIMENT_NAME": "sweep", "MLFLOW_RUN_NAME": "123_4"}
    began = with_variables(workplace, tiny_data, "training.max_steps=1", MLFLOW_TRACKING_URI=store, **theirs)
    client, run_id = MlflowClient(store), str(workplace.results()["run_id"])
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "sweep"
    assert run.info.run_name == "123_4"
    assert "MLFLOW_" not in began.stdout

    elsewhere = {"MLFLOW_TRACKING_URI": "sqlite:///elsewhere.db", "MLFLOW_EXPERIMENT_NAME": ""}
    resumed = with_variables(
        workplace, tiny_data, "training.max_steps=2", "--resume", "auto", **theirs | elsewhere
    )
    assert workplace.results()["run_id"] == run_id
    assert client.get_run(run_id).data.metrics["epoch"] == 0.2
    assert (
        "resumed_with" not in client.get_run(run_id).data.tags
        or "mlflow" not in (client.get_run(run_id).data.tags["resumed_with"])
    )
    assert not (workplace.folder / "elsewhere.db").exists()
    (line,) = [line for line in resumed.stdout.splitlines() if "MLFLOW_" in line]
    assert "logging.mlflow_tracking_uri" in line
    assert "MLFLOW_TRACKING_URI" in line


WITHOUT_MLFLOW = """
import sys
sys.modules["mlflow"] = None  # whoever imports it fails
from detr_dist.cli import main
main(sys.argv[1:])
"""


USERS_TRACKERS = """
import json
from pathlib import Path
import detr_dist as dd

class Sheet(dd.Tracker):
    def __init__(self):
        self.rows = []

    def log_params(self, params):
        self.rows.append(["params", params["batch_size"], params["logging_trackers"]])

    def log_metrics(self, metrics, step):
        self.rows.append(["metrics", step, sorted(metrics)])

    def log_file(self, path, artifact_path=""):
        self.rows.append(["file", f"{artifact_path}/{path.name}", path.stat().st_size > 0])

    def log_folder(self, folder, artifact_path):
        self.rows.append(["folder", artifact_path, len(list(folder.iterdir())) > 0])

    def close(self, status, error=None):
        Path("sheet.json").write_text(json.dumps([*self.rows, ["close", status, error]]))

class Broken(dd.Tracker):
    def log_metrics(self, metrics, step):
        raise ConnectionError("the service is away")
"""


def test_a_run_without_mlflow_tracking_does_not_import_mlflow(workplace, tiny_data: Path) -> None:
    (workplace.folder / "sheets.py").write_text(USERS_TRACKERS)
    trackers = "logging.trackers=[sheets.py:Sheet, sheets.Broken]"
    arguments = (
        *workplace._training(tiny_data, "out"), "training.max_steps=1", "logging.mlflow=false", trackers
    )  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_MLFLOW, *map(str, arguments)],
        cwd=workplace.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    out = workplace.folder / "out"
    assert not (out / "outbox").exists()
    (warning,) = [line for line in finished.stdout.splitlines() if "Broken" in line and "warning" in line]
    assert "the service is away" in warning
    rows = json.loads((workplace.folder / "sheet.json").read_text())
    assert rows[0] == ["file", "/config.yaml", True]
    assert ["params", 4, "sheets.py:Sheet, sheets.Broken"] in rows
    metrics = {name for kind, step, names in rows if kind == "metrics" and step == 1 for name in names}
    assert {"train_loss", "val_map", "memory_ram_gb"} <= metrics
    assert ["folder", "checkpoints/last", True] in rows
    assert ["folder", "model", True] in rows
    assert rows[-2:] == [["file", "logs/train.log", True], ["close", "FINISHED", None]]
    assert "train.log" in {path.name for path in (out / "logs").iterdir()}
    by_mlflow = mlflow.pytorch.load_model(str(out / "model"))
    by_transformers = AutoModelForObjectDetection.from_pretrained(out / "model")
    torch.testing.assert_close(
        dict(by_mlflow.state_dict()), dict(by_transformers.state_dict()), rtol=0, atol=0
    )


def test_the_log_of_a_failed_run_has_the_traceback(workplace, tiny_data: Path) -> None:
    failed = workplace.train(tiny_data, "training.learning_rate=1e30", "training.gradient_clip=0")
    assert failed.returncode == 1, failed.stdout
    run_id = tracked_run(workplace)
    client = MlflowClient(f"sqlite:///{workplace.folder / 'mlflow.db'}")
    log = Path(client.download_artifacts(run_id, "logs/train.log", str(workplace.folder))).read_text()
    assert "Traceback" in log
    assert client.get_run(run_id).data.tags["error"].splitlines()[0] in log
    assert "Traceback" not in failed.stderr


def test_long_class_names_lose_no_metrics(
    workplace, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = "file:./mlruns"  # makes file names of metric names: the strictest of MLflow's stores
    data = Path(shutil.copytree(tiny_data, workplace.folder / "data"))
    names = ["x" * 240 + "Ä", "ä" * 240]
    for path in data.rglob("*.json"):
        document = json.loads(path.read_text())
        for category, name in zip(document["categories"], names, strict=True):
            category["name"] = name
        path.write_text(json.dumps(document))
    finished = workplace.train(data, "training.max_steps=1", f"logging.mlflow_tracking_uri={store}")
    assert finished.returncode == 0, finished.stderr
    assert "refuses" not in finished.stdout
    assert "cannot be reached" not in finished.stdout
    monkeypatch.chdir(workplace.folder)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    metrics = MlflowClient(store).get_run(str(workplace.results()["run_id"])).data.metrics
    assert "val_map" in metrics
    for start in ("val_xxx", "val_äää"):
        names = [name for name in metrics if name.startswith(start) and name.endswith("_map")]
        assert sorted(name.endswith("_center_map") for name in names) == [False, True]
