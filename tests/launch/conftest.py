"""A real Slurm for tests: two nodes on this host, in a folder of their own, removed after the tests.

Needs munge, slurmctld, slurmd and slurm-client, but neither root nor systemd nor anything in /etc. A node is
a `slurmd` on its own port, called 127.0.0.2 or 127.0.0.3: names that need no name server.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
# Our commands in an environment that is not activated, and daemons outside the PATH of a user.
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credentials expire: 5 s is the minimum.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Believe the number of cores below.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=30
SlurmdTimeout=8
# A node that was lost may come back by itself.
ReturnToService=2
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Gres=gpu:8 State=UNKNOWN"


def what_is_missing() -> list[str]:
    return [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]


@dataclass
class SlurmCluster:
    """Slurm cluster that runs inside its context.

    Its folder is not below pytest's: the path of a socket has a limited length, and all users may have to
    reach it.
    """

    names: tuple[str, ...] = ("127.0.0.2", "127.0.0.3")
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        try:
            self._configure()
            munge = {name: self.folder / f"munge.{name}" for name in ("key", "pid", "seed")}
            self._start(
                "munged", "--foreground", f"--socket={self.folder / 'munge.sock'}",
                *(f"--{name}-file={path}" for name, path in munge.items()),
                f"--log-file={self.folder / 'munged.log'}",
            )  # fmt: skip
            self.wait_until((self.folder / "munge.sock").exists, 10)
            self._start("slurmctld", "-D", "-c")
            self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), 30)
            for name in self.names:
                self.start_node(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):  # the daemons end in order if they can
            for daemon in self._daemons.values():
                daemon.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                for daemon in self._daemons.values():
                    daemon.wait(5)
        self._kill({"SLURM_CONF": str(self.folder / "slurm.conf")})
        shutil.rmtree(self.folder)

    def _configure(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(self.names))
        nodes = (
            NODE.format(name=name, host=host, port=number)
            for name, number in zip(self.names, ports, strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, port=port, user=user, folder=self.folder, nodes="\n".join(nodes))
        )
        for number in range(8):  # Slurm wants a device for each GPU
            (self.folder / f"gpu{number}").symlink_to(os.devnull)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        # Nothing uses control groups here; with "autodetect" slurmd insists on them all the same.
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={_no_cgroups()}\n")

    def _start(self, program: str, *arguments: str, node: str | None = None) -> None:
        environment = self._environment() | ({"SLURMD_NODENAME": node} if node else {})
        with (self.folder / f"{node or program}.log").open("ab") as log:
            self._daemons[node or program] = subprocess.Popen(
                [str(shutil.which(program, path=SEARCHED)), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Return the environment without variables of a surrounding Slurm or of this trainer."""
        others = re.compile("(SLURM|SBATCH|SRUN|ACCELERATE|MLFLOW|DETR_DIST|OMP)_")
        inherited = {k: v for k, v in os.environ.items() if not others.match(k)}
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCHED, "ACCELERATE_USE_CPU": "true"}
        return inherited | ours

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, node=name)
        self.wait_until(lambda: self.run("sinfo", "-h", "-n", name, "-o", "%T").strip() == "idle", 60)

    def kill_node(self, name: str) -> None:
        """Kill all processes of a node without notification, as a power failure does."""
        self._kill({"SLURM_CONF": str(self.folder / "slurm.conf"), "SLURMD_NODENAME": name})
        self._daemons.pop(name).wait()

    @staticmethod
    def _kill(marks: Mapping[str, str]) -> None:
        """Kill every process that was started with these variables."""
        wanted = {f"{name}={value}".encode() for name, value in marks.items()}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= {*(folder / "environ").read_bytes().split(b"\0")}:
                    os.kill(int(folder.name), signal.SIGKILL)

    def run(
        self,
        *command: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> str:
        """Return the output of a command that runs where Slurm can be reached."""
        finished = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self._environment() | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert finished.returncode == 0 or not check, finished.stdout + finished.stderr
        return finished.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields that `scontrol` reports for a job: JobState, Restarts, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job_id)))

    def wait_for_end(self, job_id: str, timeout_s: float) -> dict[str, str]:
        self.wait_until(lambda: self.job(job_id)["JobState"] in ENDED, timeout_s, every_s=0.25)
        return self.job(job_id)

    def wait_until(self, condition: Callable[[], object], timeout_s: float, *, every_s: float = 0.05) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(every_s)

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


def _free_ports(number: int) -> Iterator[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    yield from [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()


def _no_cgroups() -> str:
    """Return the plug-in that does nothing; its name depends on the release."""
    slurmd = str(shutil.which("slurmd", path=SEARCHED))
    words = subprocess.run([slurmd, "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", words)
    assert found is not None, words
    return "disabled" if (int(found[1]), int(found[2])) >= (24, 5) else "cgroup/v1"


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Start two nodes, whose GPUs exist only for Slurm: processes with one compute on the CPU."""
    if missing := what_is_missing():
        message = f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with SlurmCluster() as cluster:
        yield cluster
