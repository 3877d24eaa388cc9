"""supervisor: nothing of a server outlives its supervisor, however either of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_multipole import supervisor

# a server that starts a stubborn child, tells both process ids, and then behaves as `ending` says
SERVER = """
import os, signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
{ending}
"""
SUPERVISOR = """
import sys
from sglang_multipole import supervisor
sys.exit(supervisor.run([sys.executable, "-c", sys.argv[1]], stop_seconds=float(sys.argv[2])))
"""
DEADLINE_SECONDS = 20.0


class Supervised:
    """A supervisor under test, with the process ids of its server and of the server's child."""

    def __init__(self, ending: str, deaf: bool = False, stop_seconds: float = 10.0) -> None:
        server = SERVER.format(ending=ending, deaf=deaf)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, server, str(stop_seconds)],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids = [int(pid) for pid in self.process.stdout.readline().split()]
        assert len(self.pids) == 2

    def wait(self) -> int:
        return self.process.wait(DEADLINE_SECONDS)

    def any_alive(self) -> bool:
        return any(_is_running(pid) for pid in self.pids)


@pytest.fixture
def supervised() -> Iterator[type[Supervised]]:
    started: list[Supervised] = []

    def start(*args: object, **kwargs: object) -> Supervised:
        started.append(Supervised(*args, **kwargs))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        one.process.stdout.close()


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3)])
def test_the_servers_exit_code_is_ours(supervised, code: int, expected: int) -> None:
    one = supervised(f"sys.exit({code})")
    assert one.wait() == expected
    assert not one.any_alive()


def test_a_server_that_kills_itself_is_a_failure(supervised) -> None:
    one = supervised("os.kill(os.getpid(), signal.SIGKILL)")
    assert one.wait() == 1
    assert not one.any_alive()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_server_and_children(supervised, signum: int) -> None:
    one = supervised("time.sleep(600)")
    one.process.send_signal(signum)
    assert one.wait() == 128 + signum
    assert not one.any_alive()


def test_a_deaf_server_is_killed_after_its_time(supervised) -> None:
    one = supervised("time.sleep(600)", deaf=True, stop_seconds=0.5)
    one.process.terminate()
    assert one.wait() == 128 + signal.SIGTERM
    assert not one.any_alive()


def test_a_second_signal_does_not_wait(supervised) -> None:
    one = supervised("time.sleep(600)", deaf=True, stop_seconds=600.0)
    one.process.terminate()
    time.sleep(0.5)
    assert one.process.poll() is None
    one.process.terminate()
    assert one.wait() == 128 + signal.SIGTERM
    assert not one.any_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_a_killed_supervisor_takes_the_server_along(supervised) -> None:
    one = supervised("time.sleep(600)")
    one.process.kill()
    one.wait()
    server, child = one.pids
    deadline = time.monotonic() + DEADLINE_SECONDS
    while _is_running(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(server)
    os.kill(child, signal.SIGKILL)  # SGLang's children watch their parent themselves


def test_the_callers_signal_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert supervisor.run([sys.executable, "-c", "pass"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie waits for whoever became its parent
