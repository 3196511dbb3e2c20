"""The process that does not start, stops with an error, or hangs is named."""

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch

from detr_dist.errors import UsageError
from detr_dist.rendezvous import Rendezvous, StallWatch


@pytest.fixture
def second_process(monkeypatch: pytest.MonkeyPatch) -> torch.distributed.PrefixStore:
    """Return the store of a launcher of two processes, as the second one sees it; this one is the first."""
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    return torch.distributed.PrefixStore("detr_dist/0", agent)


def post(store: torch.distributed.PrefixStore, phase: str, **facts: object) -> None:
    store.set(f"{phase}/1", json.dumps(facts))


@pytest.mark.parametrize(("device", "complaint"), [("gpu", "GPUs on node1 but none on "), ("cpu", None)])
def test_all_processes_must_compute_on_the_same_kind_of_device(
    second_process: torch.distributed.PrefixStore, device: str, complaint: str | None
) -> None:
    post(second_process, "start", host="node1", device=device, problem=None)
    rendezvous = Rendezvous.of_environment(None)
    if complaint is None:
        rendezvous.check_in(5.0)
    else:
        with pytest.raises(UsageError, match=complaint):
            rendezvous.check_in(5.0)


def test_the_error_of_a_stopped_process_is_quoted_by_the_others(
    second_process: torch.distributed.PrefixStore, tmp_path: Path
) -> None:
    post(second_process, "start", host="node1", device="cpu", problem=None)
    rendezvous = Rendezvous.of_environment(tmp_path / "stacks")
    rendezvous.check_in(5.0)
    rendezvous.note(step=7, image_ids=[3, 4])
    post(second_process, "end", reason="the disk is gone", is_cause=True)
    line = rendezvous.explain(RuntimeError("Connection closed"), is_lost_contact=True)
    assert "process 1 (node1): the disk is gone" in line
    assert "at step 7, image ids [3, 4]" in line
    assert "Current thread" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_the_last_nccl_collectives_are_written_next_to_the_stacks(
    second_process: torch.distributed.PrefixStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(torch._C._distributed_c10d, "_dump_nccl_trace"):
        pytest.skip("this torch has no NCCL")
    post(second_process, "start", host="node1", device="cpu", problem=None)
    rendezvous = Rendezvous.of_environment(tmp_path / "stacks")
    rendezvous.check_in(5.0)
    post(second_process, "end", reason="no progress", is_cause=True)
    rendezvous.explain(RuntimeError("timed out"), is_lost_contact=True)
    assert not (tmp_path / "stacks" / "nccl_rank_0").exists(), "on the CPU there is no NCCL"
    monkeypatch.setattr("detr_dist.rendezvous.uses_cpu", lambda: False)
    rendezvous.explain(RuntimeError("timed out"), is_lost_contact=True)
    assert "entries" in pickle.loads((tmp_path / "stacks" / "nccl_rank_0").read_bytes())


def test_the_progress_watch_acts_after_its_timeout_unless_paused() -> None:
    stalled = threading.Event()
    watch = StallWatch(lambda limit_s: stalled.set())
    watch.start(1.0)
    try:
        assert not stalled.wait(3.0), "nothing has begun"
        watch.progress()
        watch.pause()
        assert not stalled.wait(3.0)
        watch.progress()
        assert stalled.wait(5.0)
    finally:
        watch.close()
