"""`sglang-multipole top`: sums, gaps, recordings, plain lines, and a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from sglang_multipole import cli, event_source, top_view
from sglang_multipole.events import EventPublisher
from sglang_multipole.top_state import TopState

POOL = {"bytes": 1 << 20, "workspace_bytes": 0, "places": 20, "free": 17, "sealed": 2, "open": 1}


def make_event(seq: int, event: str, **fields: Any) -> dict[str, Any]:
    head = {"schema": 1, "run": "a1", "seq": seq, "time": 1000.0 + seq, "dropped": 0}
    return head | {"event": event} | fields


def make_step(seq: int, **changes: Any) -> dict[str, Any]:
    row = {"rid": "[red]r1", "context_tokens": 8000, "exact_tokens": 800, "sparse": True}
    off = {"rid": "r2", "context_tokens": 100, "exact_tokens": 100, "sparse": False}
    fields = {
        "steps": 10,
        "step_ms": 12.5,
        "sparse_steps": 10,
        "dense_steps": {"below_min_context": 0, "switched_off": 10},
        "exact_tokens": 9000,
        "context_tokens": 81000,
        "recluster_ms": 3.0,
        "pool": POOL,
        "num_requests": 2,
        "num_sparse_requests": 1,
        "requests": [row | {"token_budget": 512}, off | {"token_budget": None}],
    }
    return make_event(seq, "step", **fields | changes)


def make_request(seq: int) -> dict[str, Any]:
    sums = {"sparse_steps": 20, "dense_steps": 0, "exact_tokens": 1, "context_tokens": 4}
    return make_event(
        seq,
        "request",
        rid="[red]r1",
        finish_reason="stop",
        prompt_tokens=7990,
        completion_tokens=21,
        activity=sums,
    )


EVENTS = [
    make_event(0, "start", model="demo/model", pool=POOL),
    make_event(1, "segments", built=2, shared=1, evicted=0, open_builds=3, recluster_ms=3.0),
    make_step(2),
    make_step(3),
    make_request(4),
    make_event(5, "stop"),
]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(orjson.dumps(event) + b"\n" for event in EVENTS))
    return path


@pytest.fixture
def state() -> TopState:
    state = TopState()
    for event in EVENTS:
        state.apply(event)
    return state


def test_events_are_summed_up(state: TopState) -> None:
    assert (state.steps, state.sparse_steps, state.num_finished) == (20, 20, 1)
    assert state.share_read == pytest.approx(1 / 9)
    assert state.segments["shared"] == 1
    assert [row["rid"] for row in state.requests] == ["r2"]
    assert (state.num_requests, state.num_sparse_requests) == (1, 0)
    assert (state.lost, state.is_stopped) == (0, True)


def test_missing_numbers_are_counted_and_a_new_run_begins_anew(state: TopState) -> None:
    state.apply(make_step(9))
    assert state.lost == 3
    state.apply(make_step(40) | {"run": "b2"})
    assert (state.run, state.lost, state.steps, state.seq) == ("b2", 0, 10, 40)


def test_an_event_of_a_later_version_is_passed_over(state: TopState) -> None:
    state.apply(make_event(6, "new_kind", of_field=1))
    assert (state.seq, state.lost) == (6, 0)


def test_the_screen_shows_requests_as_they_are_named() -> None:
    state = TopState()
    for event in EVENTS[:3]:
        state.apply(event)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(top_view.screen(state, "tcp://127.0.0.1:5570", now=state.time + 9))
    text = console.export_text()
    # square brackets are no markup here
    assert "[red]r1" in text
    for shown in ("demo/model", "8000", "10.0 %", "off", "dense", "3/20 places", "switched_off 10"):
        assert shown in text
    assert "nothing for 9 s: the server is gone, or paused" in text


def test_the_means_of_audits_are_shown_once_there_is_one() -> None:
    state = TopState()
    state.apply(EVENTS[0])

    def shown() -> str:
        console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(top_view.screen(state, "here", now=None))
        return console.export_text()

    assert "audit" not in shown()
    for seq, error, mass in ((1, 0.02, 0.9), (2, 0.04, 0.8)):
        numbers = {"relative_error": error, "mass_covered": mass}
        state.apply(make_event(seq, "audit", rid="r1", layer=2, context_tokens=9000, **numbers))
    text = shown()
    assert "relative error 0.0300, mass covered 85.0 %, means of 2 audited steps" in text


def test_without_a_terminal_there_are_plain_lines(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["top", "--replay", str(recording), "--speed", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "requests 2 (sparse 1) steps 10 step 12.5 ms read 11.1 % pool 3/20" in lines[0]
    assert lines[-1].endswith("finished 1 lost 0")


def test_a_recording_of_a_replay_is_the_same_file(recording: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    arguments = ["top", "--replay", str(recording), "--speed", "0", "--record", str(copy)]
    assert cli.main(arguments) == 0
    assert copy.read_bytes() == recording.read_bytes()


def test_a_replay_keeps_the_time_between_events(recording: Path) -> None:
    before = time.monotonic()
    assert len(list(event_source.replay(recording, speed=50))) == len(EVENTS)
    assert 0.1 <= time.monotonic() - before < 2


def test_a_reader_that_has_had_enough_is_no_error(recording: Path) -> None:
    command = f"{sys.executable} -m sglang_multipole top --replay {recording} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense\n", "line 1: an event must be a JSON object"),
        (b"[1]\n", "line 1: an event must have schema 1"),
        (b'{"schema": 2}\n', "use the version of sglang-multipole that the server runs"),
        (b'{"schema": 1, "run": "a"}\n', "an event must have dropped, event, seq, time"),
    ],
)
def test_a_file_that_is_no_recording_is_one_clear_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(content)
    assert cli.main(["top", "--replay", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_address_that_is_none_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--endpoint", "5570"]) == 1
    assert "must be an address such as tcp://127.0.0.1:5570, got '5570'" in capsys.readouterr().err


class Terminal:
    """A pseudo-terminal with `sglang-multipole top` running in it."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        self.text = ""
        command = [sys.executable, "-m", "sglang_multipole", "top", *arguments]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            # a test run in the background of a shell hands down that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)

    def read_until(self, is_enough: Callable[[str], bool], seconds: float = 60.0) -> str:
        """What was written to the terminal, without its control sequences."""
        deadline = time.monotonic() + seconds
        while not is_enough(self.text):
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # its other end is closed
                    data = b""
                assert data, self.text
                self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        return self.text

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(20)
        os.close(self.master)
        return code


def test_a_recording_is_shown_in_a_real_terminal(recording: Path) -> None:
    terminal = Terminal("--replay", str(recording), "--speed", "0")
    text = terminal.read_until(lambda text: "the server has stopped" in text)
    assert terminal.process.wait(20) == 0
    os.close(terminal.master)
    assert "multipole attention: demo/model" in text
    assert "7990" in text


def test_live_events_are_shown_in_a_real_terminal(tmp_path: Path) -> None:
    publisher = EventPublisher(f"ipc://{tmp_path}/events", heartbeat_seconds=0.05)
    terminal = Terminal("--endpoint", publisher.endpoint)
    terminal.read_until(lambda text: re.search(r"event \d+", text) is not None)
    fields = {name: make_step(0)[name] for name in make_step(0) if name not in make_event(0, "")}
    publisher.publish("step", **fields)
    text = terminal.read_until(lambda text: "[red]r1" in text)
    assert "12.5 ms" in text
    # Ctrl-C ends it in order, and leaves the terminal's alternate screen
    assert terminal.close() == 0
    publisher.close()
