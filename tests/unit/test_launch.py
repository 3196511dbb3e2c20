"""The roll call of several machines, each in a thread of its own."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from detr_dist.errors import DetrDistError
from detr_dist.launch import Machines, call_machines

HOST = socket.gethostname()


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def call(port: int, *ranks: int, number: int, within_s: float = 20.0) -> list[str]:
    """What each machine is told, "" if all is well."""

    def one(rank: int) -> str:
        try:
            call_machines(Machines(number, rank, "127.0.0.1", port), within_s)
        except DetrDistError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_machines_that_are_all_there_go_on_and_leave_the_port_free(port: int) -> None:
    assert call(port, 2, 0, 1, number=3) == ["", "", ""]
    assert call(port, 0, 1, number=2) == ["", ""]  # at once again


def test_a_rank_that_was_given_twice_is_said_to_all_at_once(port: int) -> None:
    began_at = time.monotonic()
    told = call(port, 0, 1, 1, number=3)
    assert set(told) == {f"--machine_rank 1 was given twice, on {HOST} and on {HOST}; give each its own"}
    assert time.monotonic() - began_at < 10  # of 20 s


def test_a_rank_that_is_too_large_is_said_to_all_at_once(port: int) -> None:
    began_at = time.monotonic()
    assert set(call(port, 0, 2, number=2)) == {f"--machine_rank 2 on {HOST}: with 2 machines it is 0 to 1"}
    assert time.monotonic() - began_at < 10  # of 20 s


def test_machines_that_do_not_come_are_named_to_those_that_do(port: int) -> None:
    missing = rf"of 4 machines these did not come within 2 s: 1, 3 \(0 is {HOST}, 2 is {HOST}\); look whether"
    assert [bool(re.match(missing, told)) for told in call(port, 0, 2, number=4, within_s=2)] == [True, True]


def test_without_machine_0_the_others_say_where_they_looked_for_it(port: int) -> None:
    (told,) = call(port, 1, number=2, within_s=1.5)
    assert told.startswith(
        f"machine 0 did not answer at 127.0.0.1:{port} within 2 s (Connection refused); look"
    )


def test_a_port_that_something_else_has_is_said_on_machine_0(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        (told,) = call(port, 0, number=2)
    assert told.startswith(
        f"port {port} cannot be used on {HOST} (Address already in use): something else has it"
    )


def test_what_others_send_to_the_port_is_passed_over(port: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(call, port, 0, number=2)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"machine": 1}\n'):
            for _ in range(50):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as link:
                        link.sendall(noise)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
        assert call(port, 1, number=2) == [""]
        assert zero.result() == [""]
