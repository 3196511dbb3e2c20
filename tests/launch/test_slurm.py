"""The shipped scripts on a real Slurm: training on two nodes, preemption, loss of a node, failures."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
SUBMIT = REPOSITORY / "launch" / "slurm" / "submit.sh"
NUM_STEPS = 12
# Of 24 images, in two epochs of six steps, by four processes.
SETTINGS = (
    "training.batch_size=1",
    "training.num_epochs=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
)
TWO_BY_TWO = ("--nodes", "2", "--ntasks-per-node", "2")

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Job:
    """Submitted training run of a workplace, as others can observe it."""

    slurm: object
    folder: Path
    id: str
    statuses: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """Return the output of the batch script."""
        path = self.folder / f"detr-dist-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def node_log(self, node: int) -> str:
        return (self.folder / f"detr-dist-{self.id}.node-{node}.out").read_text()

    @property
    def everything(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"detr-dist-{self.id}*.out")))

    @property
    def state(self) -> str:
        return str(self.slurm.job(self.id)["JobState"])

    def note_status(self) -> None:
        """Record the status of the run in MLflow when it has changed."""
        for (status,) in self._ask("SELECT status FROM runs"):
            if [status] != self.statuses[-1:]:
                self.statuses.append(status)

    def step(self) -> int:
        """Return the last step with a loss in MLflow."""
        ((step,),) = self._ask("SELECT MAX(step) FROM metrics WHERE key = 'train_loss'")
        return step or 0

    def _ask(self, query: str) -> list[tuple]:
        with sqlite3.connect(f"file:{self.folder / 'mlflow.db'}?mode=ro", uri=True) as database:
            return database.execute(query).fetchall()

    def wait_until(self, condition: Callable[[], object], *, every_s: float = 0.05) -> None:
        asked_at = time.monotonic()

        def is_met() -> bool:
            nonlocal asked_at
            self.note_status()
            if condition():
                return True
            if time.monotonic() - asked_at > 1:  # Slurm's answer takes a process
                assert self.state in ("PENDING", "RUNNING", "COMPLETING") or condition(), self.everything
                asked_at = time.monotonic()
            return False

        self.slurm.wait_until(is_met, 300, every_s=every_s)

    def wait_for_end(self) -> None:
        self.wait_until(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED"), every_s=0.25)
        self.note_status()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory, new_workplace) -> Path:
    """Generate scenes."""
    place = new_workplace(tmp_path_factory.mktemp("scenes"))
    finished = place.run("make-data", "data", "--num-train", "24", "--num-val", "4")
    assert finished.returncode == 0, finished.stderr
    return place.folder / "data"


@pytest.fixture(scope="session")
def submit(slurm, scenes: Path):
    """Submit a training run from a workplace, with options of sbatch and of the trainer."""

    def start(workplace, *training: str, sbatch: tuple[str, ...] = TWO_BY_TWO, script: Path = SUBMIT) -> Job:
        data = ("--train-dir", scenes / "train", "--val-dir", scenes / "val", "--output-dir", "out")
        options = ("--config", "tiny.yaml", *map(str, data), *SETTINGS, *training)
        printed = slurm.run("bash", str(script), *sbatch, "--", *options, cwd=workplace.folder)
        return Job(slurm, workplace.folder, printed.split()[-1])

    return start


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, new_workplace, submit):
    place = new_workplace(tmp_path_factory.mktemp("uninterrupted"))
    job = submit(place)
    job.wait_for_end()
    return place, job


def steps(workplace) -> list[int]:
    return [step for step, _ in workplace.history("train_loss")]


def test_two_nodes_with_two_processes_each_train_in_one_mlflow_run(uninterrupted) -> None:
    place, job = uninterrupted
    assert job.state == "COMPLETED", job.everything
    assert "4 processes (world size 4) on 1 node, DDP over gloo" in job.node_log(0)
    assert "node 1 of 2" in job.node_log(1)
    assert job.statuses == ["RUNNING", "FINISHED"]
    assert steps(place) == list(range(1, NUM_STEPS + 1))
    assert not list(place.folder.glob("*.stopped"))


def test_a_preempted_job_is_requeued_and_gives_the_uninterrupted_result(
    workplace, submit, slurm, uninterrupted
) -> None:
    job = submit(workplace)
    job.wait_until(lambda: job.step() >= 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # as Slurm does before the time is over
    job.wait_for_end()
    assert job.state == "COMPLETED", job.everything
    assert slurm.job(job.id)["Restarts"] == "1"
    assert "asked to stop (SIGUSR1)" in job.log
    stopped_at = re.search(r"resuming from \S+ at step (\d+)", job.node_log(0))
    assert stopped_at is not None, job.everything
    assert 3 <= int(stopped_at[1]) < NUM_STEPS
    assert job.statuses == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]

    expected_run, _ = uninterrupted
    assert workplace.history("train_loss") == expected_run.history("train_loss")
    assert steps(workplace) == list(range(1, NUM_STEPS + 1))
    last, expected = (place.folder / "out" / "checkpoints" / "last" for place in (workplace, expected_run))
    weights = load_file(last / "model.safetensors")
    for key, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(weights[key], tensor), key


def test_a_job_that_loses_a_node_is_requeued_and_completes(workplace, submit, slurm) -> None:
    job = submit(workplace, "training.batch_size=2", sbatch=("--nodes", "2", "--gpus-per-node", "1"))
    job.wait_until(lambda: job.step() >= 3)
    slurm.kill_node(slurm.names[1])
    job.wait_until(lambda: job.state == "PENDING")
    slurm.start_node(slurm.names[1])
    job.wait_for_end()
    assert job.state == "COMPLETED", job.everything
    assert slurm.job(job.id)["Restarts"] == "1"
    assert "resuming from" in job.node_log(0)
    assert job.statuses[-1] == "FINISHED"
    assert "FINISHED" not in job.statuses[:-1]
    assert steps(workplace) == list(range(1, NUM_STEPS + 1))


def test_a_failed_job_stays_failed_and_names_the_relevant_line(workplace, submit, slurm) -> None:
    job = submit(workplace, "training.learning_rat=1", sbatch=())
    job.wait_for_end()
    assert job.state == "FAILED", job.everything
    assert slurm.job(job.id)["Restarts"] == "0"
    found = re.search(r"training failed; look first at (\S+):(\d+): (.*)", job.log)
    assert found is not None, job.log
    assert "training.learning_rat" in found[3]
    assert Path(found[1]).read_text().splitlines()[int(found[2]) - 1] == found[3]


def test_a_cancelled_job_saves_and_is_not_requeued(workplace, submit, slurm) -> None:
    job = submit(workplace, sbatch=())
    job.wait_until(lambda: job.step() >= 3)
    slurm.run("scancel", job.id)
    job.wait_for_end()
    slurm.wait_until(lambda: "saved in out/checkpoints/last" in job.node_log(0), 30)
    slurm.wait_until(lambda: job.statuses[-1:] == ["KILLED"] or job.note_status(), 30)
    assert slurm.job(job.id)["Restarts"] == "0"


SITE = """
sbatch_options=(--nodes=2 --ntasks-per-node=3 --output=mine-%j.out)
prepare_node() {{ PATH="{programs}:$PATH"; }}
export ACCELERATE_CONFIG_FILE=mine.yaml
"""
# Is stopped before it has saved anything, then after it has, then finishes.
THREE_STARTS = """#!/usr/bin/env bash
echo "arguments: $*"
[[ "$SLURM_NODEID" == 1 || "$DETR_DIST_START" == 3 ]] && exit
[[ "$DETR_DIST_START" == 2 ]] && echo '  "step": 5,' >out/checkpoints/last/state.json
echo "stopped" >"$DETR_DIST_STOPPED_FILE"
exit 1
"""
NEVER_SAVES = """#!/usr/bin/env bash
echo "stopped" >"$DETR_DIST_STOPPED_FILE"
exit 1
"""


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, slurm) -> dict[str, tuple[Path, str]]:
    """Submit two jobs with site settings and a script as launcher, and return folder and id of each.

    They run at the same time, because Slurm holds a requeued job for half a minute.
    """
    jobs = {}
    for launcher in (THREE_STARTS, NEVER_SAVES):
        folder = tmp_path_factory.mktemp("stand_in")
        launch, programs = folder / "a repository" / "launch" / "slurm", folder / "programs"
        shutil.copytree(SUBMIT.parent, launch)
        programs.mkdir()
        (launch / "site.env").write_text(SITE.format(programs=programs))
        (programs / "python").write_text(launcher)
        (programs / "python").chmod(0o755)
        (folder / "out" / "checkpoints" / "last").mkdir(parents=True)  # of an earlier run
        (folder / "out" / "checkpoints" / "last" / "state.json").write_text('{\n  "step": 9,\n}\n')
        options = ("--output-dir=out", "--resume", "runs:/abc/checkpoints/last")
        printed = slurm.run("bash", str(launch / "submit.sh"), "--", *options, cwd=folder)
        jobs[launcher] = folder, printed.split()[-1]
    return jobs


def test_site_settings_apply_and_resume_is_used_until_the_job_has_saved(slurm, stand_ins) -> None:
    folder, job_id = stand_ins[THREE_STARTS]
    assert slurm.wait_for_end(job_id, 240)["JobState"] == "COMPLETED", slurm.logs()
    for node in (0, 1):
        lines = (folder / f"mine-{job_id}.node-{node}.out").read_text().splitlines()
        starts = [line for line in lines if "arguments: " in line]
        for line in starts:
            assert "--config_file mine.yaml" in line
            assert f"--num_machines 2 --num_processes 6 --machine_rank {node}" in line
            assert f"--main_process_ip {slurm.names[0]}" in line
        given = "--resume runs:/abc/checkpoints/last"
        assert [line.partition("train_detr.py --output-dir=out ")[2] for line in starts] == [
            *(given, given, f"{given} --resume auto")
        ]
    assert {path.suffix for path in folder.glob("mine-*")} == {".out"}, "nothing else is left"


def test_a_job_that_never_saves_a_newer_checkpoint_stops_being_requeued(slurm, stand_ins) -> None:
    folder, job_id = stand_ins[NEVER_SAVES]
    assert slurm.wait_for_end(job_id, 240)["JobState"] == "FAILED", slurm.logs()
    assert slurm.job(job_id)["Restarts"] == "2"
    log = (folder / f"mine-{job_id}.out").read_text()
    assert "three starts have ended without a newer checkpoint (stopped)" in log


def test_a_stop_signal_while_a_node_is_prepared_is_handled(tmp_path: Path) -> None:
    launch = tmp_path / "launch" / "slurm"
    shutil.copytree(SUBMIT.parent, launch)
    (launch / "site.env").write_text(f'prepare_node() {{ PATH="{tmp_path}:$PATH"; sleep 2; }}\n')
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "launched"\n')
    (tmp_path / "python").chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_CPUS_ON_NODE": "2"}
    ours = {"DETR_DIST_START": "1", "DETR_DIST_PROCESSES_PER_NODE": "1", "DETR_DIST_FIRST_HOST": "localhost"}
    node = subprocess.Popen(
        ["bash", launch / "node.sh"], env=os.environ | given | ours, stdout=subprocess.PIPE, text=True
    )
    time.sleep(1)
    node.send_signal(signal.SIGUSR1)
    printed, _ = node.communicate(timeout=30)
    assert node.returncode == 0
    assert printed.splitlines()[-1] == "launched"


def test_the_job_script_alone_works_only_in_a_repository_folder(tmp_path: Path, slurm) -> None:
    (tmp_path / "python").write_text("#!/usr/bin/env bash\ntrue\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    script = str(SUBMIT.with_name("train.sbatch"))
    for folder, state in ((REPOSITORY, "COMPLETED"), (tmp_path, "FAILED")):
        log = tmp_path / f"{state}.out"
        options = ("--parsable", "--chdir", str(tmp_path), "--output", str(log))
        job_id = slurm.run("sbatch", *options, script, cwd=folder, environment=environment).strip()
        assert slurm.wait_for_end(job_id, 30)["JobState"] == state, log.read_text()
    assert "submit with launch/slurm/submit.sh, or in the repository's folder" in log.read_text()


def examples() -> list[str]:
    """Return the documented commands that submit a job."""
    texts = [(REPOSITORY / "docs" / "slurm.md").read_text(), SUBMIT.read_text().replace("\n# ", "\n")]
    found = re.findall(r"^ *(bash launch/slurm/submit\.sh (?:.*\\\n)*.*)$", "\n".join(texts), re.MULTILINE)
    return [command for command in found if "[" not in command and "..." not in command]


@pytest.mark.parametrize("command", examples())
def test_slurm_accepts_the_options_of_the_examples(command: str, slurm) -> None:
    tried = command.replace("submit.sh", "submit.sh --test-only")
    assert " to start at " in slurm.run("bash", "-c", f"({tried}) 2>&1", cwd=REPOSITORY)


def test_without_training_options_nothing_is_submitted(slurm) -> None:
    assert "they come after --" in slurm.run("bash", "-c", f"! bash '{SUBMIT}' --nodes 2 2>&1")
    assert "Submit a training to Slurm" in slurm.run("bash", str(SUBMIT), "--help")
