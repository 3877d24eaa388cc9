"""The event stream: what is sent, what is dropped, and what the scheduler never waits for."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import zmq

from sglang_multipole import events_endpoint
from sglang_multipole.activity import ActivityEntry
from sglang_multipole.config import ConfigError, MultipoleConfig
from sglang_multipole.events import EventPublisher
from sglang_multipole.local_server import find_free_port
from sglang_multipole.reporting import Reporting
from tests.test_cluster_pool import SMALL, Host


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/events"


class Subscriber:
    def __init__(self, endpoint: str):
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.linger = 0
        self.socket.subscribe(b"")
        self.socket.connect(endpoint)

    def until(self, event: str, seconds: float = 20.0) -> list[dict[str, Any]]:
        """Everything that arrives, up to and with the first such event."""
        deadline = time.monotonic() + seconds
        received: list[dict[str, Any]] = []
        while not received or received[-1]["event"] != event:
            assert self.socket.poll(max(0, deadline - time.monotonic()) * 1000), received
            topic, payload = self.socket.recv_multipart()
            received.append(orjson.loads(payload))
            assert topic.decode() == f"multipole.{received[-1]['event']}"
        return received


@pytest.fixture
def publisher(endpoint: str) -> Iterator[EventPublisher]:
    publisher = EventPublisher(endpoint, heartbeat_seconds=0.05)
    yield publisher
    publisher.close()


@pytest.fixture
def subscriber(publisher: EventPublisher) -> Iterator[Subscriber]:
    subscriber = Subscriber(publisher.endpoint)
    subscriber.until("heartbeat")
    yield subscriber
    subscriber.socket.close()


def test_events_arrive_in_order_and_numbered(
    publisher: EventPublisher, subscriber: Subscriber
) -> None:
    for number in range(200):
        publisher.publish("step", steps=number)
    publisher.close()
    events = subscriber.until("stop")
    assert [e["steps"] for e in events if e["event"] == "step"] == list(range(200))
    numbers = [event["seq"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert len({event["run"] for event in events}) == 1
    assert {event["schema"] for event in events} == {1}


def test_a_full_queue_drops_counts_and_never_waits(endpoint: str) -> None:
    publisher = EventPublisher(endpoint, queue_events=4)
    before = time.monotonic()
    for number in range(20000):
        publisher.publish("step", steps=number)
    assert time.monotonic() - before < 5
    assert publisher.dropped > 0
    publisher.close()


def test_a_subscriber_that_never_reads_delays_nobody(
    publisher: EventPublisher, subscriber: Subscriber
) -> None:
    longest = 0.0
    for number in range(5000):
        before = time.perf_counter()
        publisher.publish("step", steps=number, rids=["x" * 100] * 32)
        longest = max(longest, time.perf_counter() - before)
    assert longest < 0.5


def test_a_value_that_json_does_not_know_does_not_end_the_stream(
    publisher: EventPublisher, subscriber: Subscriber
) -> None:
    publisher.publish("request", rid=object())
    publisher.publish("request", rid="next")
    assert "object" in subscriber.until("request")[-1]["rid"]
    assert subscriber.until("request")[-1]["rid"] == "next"


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_an_occupied_address_is_one_clear_error(scheme: str, endpoint: str) -> None:
    """ZeroMQ would let a second server take a Unix socket's name from the first."""
    if scheme == "tcp":
        endpoint = f"tcp://127.0.0.1:{find_free_port()}"
    first = EventPublisher(endpoint)
    with pytest.raises(RuntimeError, match=f"must be free and of this machine, got {scheme}://"):
        EventPublisher(endpoint)
    first.close()


def test_the_socket_of_a_killed_server_is_in_nobodys_way(endpoint: str) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(endpoint.removeprefix("ipc://"))
    EventPublisher(endpoint).close()


class Req(SimpleNamespace):
    """A request of SGLang's that has ended."""

    def __init__(self, rid: str, activity: Any):
        super().__init__(
            rid=rid,
            origin_input_ids=[1] * 200,
            output_ids=[2, 3],
            customized_info={"multipole": ActivityEntry(activity)},
            finished_reason=SimpleNamespace(to_json=lambda: {"type": "length", "length": 2}),
        )


def test_a_runtime_tells_of_its_steps_segments_and_requests(endpoint: str) -> None:
    values = SMALL.to_dict() | {"events_endpoint": endpoint, "events_interval_ms": 10}
    host = Host(MultipoleConfig.from_dict(values))
    reporting = host.runtime.reporting = Reporting(host.runtime, None, True, "demo", None)
    # the address is bound when Reporting is made: what is sent before is not waited for
    subscriber = Subscriber(endpoint)
    subscriber.until("heartbeat")
    host.add("long", 1, 200)
    host.add("short", 2, 20)
    req = Req("long", host.activities["long"])
    for _ in range(2):
        host.step()
        time.sleep(0.02)
        reporting.after_step([req], [])
    host.step()
    time.sleep(0.02)
    reporting.after_step([req], [req])
    time.sleep(0.02)
    reporting.after_step([req], [req])  # as overlap scheduling does
    reporting.publisher.close()
    events = [e for e in subscriber.until("stop") if e["event"] != "heartbeat"]
    subscriber.socket.close()
    assert [e["event"] for e in events if e["event"] == "request"] == ["request"]
    steps = [e for e in events if e["event"] == "step"]
    assert sum(e["steps"] for e in steps) == 3
    assert sum(e["sparse_steps"] for e in steps) == 3
    assert sum(e["dense_steps"]["below_min_context"] for e in steps) == 3
    totals = host.runtime.totals
    assert sum(e["exact_tokens"] for e in steps) == totals.exact_tokens
    assert sum(e["context_tokens"] for e in steps) == totals.context_tokens
    assert [(r["rid"], r["sparse"]) for r in steps[0]["requests"]] == [
        ("long", True),
        ("short", False),
    ]
    # one that has ended is not listed, though a step of it was under way
    assert [r["rid"] for r in steps[-1]["requests"]] == ["short"]
    assert steps[0]["pool"] == host.runtime.pool_report() | steps[0]["pool"]
    text = (Path(__file__).parent.parent / "docs" / "events.md").read_text()
    for key in {key for event in events for key in event}:
        assert f"`{key}`" in text
    for key in {*steps[0]["requests"][0], *steps[0]["dense_steps"], *steps[0]["pool"]}:
        assert f"`{key}`" in text
    built = [e for e in events if e["event"] == "segments"]
    assert sum(e["built"] for e in built) == host.runtime.planner.stats.segments_built == 1
    request = next(e for e in events if e["event"] == "request")
    assert request["activity"] == host.activities["long"].to_dict()
    assert (request["prompt_tokens"], request["completion_tokens"]) == (200, 2)
    assert request["finish_reason"] == "length"


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:5570",
        "tcp://localhost:1",
        "tcp://[::1]:65535",
        "ipc:///run/multipole.sock",
    ],
)
def test_addresses_of_this_machine_are_accepted(endpoint: str) -> None:
    assert MultipoleConfig(events_endpoint=endpoint).events_endpoint == endpoint


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("5570", "must be a tcp:// or ipc:// address"),
        ("udp://127.0.0.1:1", "must be a tcp:// or ipc:// address"),
        ("tcp://127.0.0.1", "tcp://address:port"),
        ("tcp://127.0.0.1:0", "port 1 to 65535"),
        ("tcp://127.0.0.1:99999", "port 1 to 65535"),
        ("ipc://", "must name a socket"),
        ("ipc://" + "x" * 200, "must name a socket"),
        ("tcp://*:5570", "must be a loopback address.*events_allow_remote"),
        ("tcp://0.0.0.0:5570", "must be a loopback address"),
        ("tcp://example.com:5570", "must be a loopback address"),
    ],
)
def test_other_addresses_are_refused(endpoint: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"events_endpoint.*{message}"):
        MultipoleConfig(events_endpoint=endpoint)


def test_a_remote_address_needs_an_explicit_word() -> None:
    config = MultipoleConfig(events_endpoint="tcp://0.0.0.0:5570", events_allow_remote=True)
    assert config.events_allow_remote


def test_each_data_parallel_rank_has_its_own_address() -> None:
    assert events_endpoint.of_rank("tcp://127.0.0.1:5570", None) == "tcp://127.0.0.1:5570"
    assert events_endpoint.of_rank("tcp://127.0.0.1:5570", 2) == "tcp://127.0.0.1:5572"
    assert events_endpoint.of_rank("ipc:///run/m", 1) == "ipc:///run/m.1"
