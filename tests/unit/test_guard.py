"""When a process counts as lost, on a clock of the test's own."""

import pytest

from detr_dist.guard import Watch

LIMIT_S = 40.0


def watch_of(num_processes: int) -> Watch:
    watch = Watch(LIMIT_S, ticked_at=0.0)
    for rank in range(num_processes):
        watch.hear(rank, {"host": f"node{rank // 2}", "step": 7}, 0.0)
    return watch


def verdict(watch: Watch, *, until: float, silent: set[int], since: float = 0.0) -> tuple[float, dict] | None:
    """When what was said, all but the silent beating every half second."""
    now = since
    while now < until:
        now += 0.5
        for rank in watch.members.keys() - silent:
            watch.hear(rank, {}, now)
        if (said := watch.tick(now)) is not None:
            return now, said
    return None


def test_nobody_is_lost_while_all_beat() -> None:
    assert verdict(watch_of(3), until=500, silent=set()) is None


def test_a_silent_process_is_lost_after_the_limit_and_named_with_host_and_step() -> None:
    found = verdict(watch_of(3), until=100, silent={2})
    assert found is not None
    at, said = found
    assert LIMIT_S < at < LIMIT_S + 3
    assert said == {
        "loss": "lost contact: process 2 (node1, last at step 7) has given no sign of life for 40 s",
        "ranks": [2],
    }


def test_a_process_that_has_ended_is_named_at_once_with_those_that_end_beside_it() -> None:
    watch = watch_of(4)
    watch.lose(3, "has ended without a word", 0.1)
    watch.lose(2, "has ended without a word", 1.0)
    found = verdict(watch, until=100, silent={2, 3})
    assert found is not None
    at, said = found
    assert at < 3
    assert said["ranks"] == [2, 3]
    both = "process 2 (node1, last at step 7), process 3 (node1, last at step 7)"
    assert said["loss"] == f"lost contact: {both} has ended without a word"


@pytest.mark.parametrize("step_s", [600.0, 41.0, 6.0])
def test_a_watch_that_did_not_run_itself_blames_nobody_for_that_time(step_s: float) -> None:
    watch = watch_of(2)
    now = 0.0
    for _ in range(20):  # asleep, and then looked at before anybody else has got a word out
        now += step_s
        assert watch.tick(now) is None
        now += 0.5
        assert watch.tick(now) is None
        watch.hear(0, {}, now)
        watch.hear(1, {}, now)


def test_who_is_silent_after_all_were_asleep_is_still_found() -> None:
    watch = watch_of(2)
    assert watch.tick(600.0) is None
    found = verdict(watch, since=600.0, until=700, silent={1})
    assert found is not None
    assert 600 + LIMIT_S < found[0] < 600 + LIMIT_S + 3


def test_who_has_said_goodbye_is_not_missed() -> None:
    watch = watch_of(2)
    watch.leave(1, failed=False, now=1.0)
    watch.lose(1, "has ended without a word", 1.1)
    assert verdict(watch, until=500, silent={1}) is None


def test_processes_that_all_stop_with_an_error_within_half_a_minute_need_no_verdict() -> None:
    watch = watch_of(2)
    watch.leave(1, failed=True, now=1.0)
    assert verdict(watch, until=25, silent={1}) is None
    watch.leave(0, failed=True, now=25.0)
    assert verdict(watch, since=25.0, until=500, silent={0, 1}) is None


def test_one_that_stops_alone_with_an_error_is_named_when_the_others_stay() -> None:
    watch = watch_of(2)
    watch.leave(1, failed=True, now=1.0)
    found = verdict(watch, until=100, silent={1})
    assert found is not None
    assert 31 < found[0] < 34
    assert (
        "process 1 (node0, last at step 7) has stopped with an error, which it says itself"
        in found[1]["loss"]
    )


def test_one_that_stops_alone_is_named_at_once_when_a_collective_has_failed() -> None:
    watch = watch_of(2)
    watch.leave(1, failed=True, now=1.0)
    watch.error_grace_s = 0.0
    found = verdict(watch, since=1.0, until=100, silent={1})
    assert found is not None
    assert found[0] < 3
