"""Where `sglang-multipole top` gets events from: a live server, or a file of recorded ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import zmq

from sglang_multipole.events import SCHEMA_VERSION, TOPIC_PREFIX

Event = dict[str, Any]


class EventSource:
    """Subscribes to a server's events for as long as a `with` block lasts.

    Raises:
        ValueError: the address is none.
    """

    def __init__(self, endpoint: str):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.ipv6 = True
        self._socket.subscribe(TOPIC_PREFIX.encode())
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"the endpoint must be an address such as tcp://127.0.0.1:5570, got {endpoint!r} "
                f"({error.strerror})"
            ) from error

    def next(self, seconds: float) -> Event:
        """The next event.

        Raises:
            TimeoutError: none came for so many seconds.
        """
        if not self._socket.poll(seconds * 1000):
            raise TimeoutError(f"no event for {seconds} s")
        return parse(self._socket.recv_multipart()[-1])

    def wait_until_connected(self, seconds: float) -> None:
        """Return when events arrive: a heartbeat comes every second; see next."""
        self.next(seconds)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def __enter__(self) -> EventSource:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def live(source: EventSource, refresh_seconds: float) -> Iterator[Event | None]:
    """Events for ever; None whenever none has come for refresh_seconds."""
    while True:
        try:
            yield source.next(refresh_seconds)
        except TimeoutError:
            yield None


def replay(path: Path, speed: float) -> Iterator[Event]:
    """The events of a recording, speed times as fast as they came; 0: without waiting.

    Raises:
        ValueError: a line is no event of a version that is known.
    """
    before = None
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                event = parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if speed and before is not None:
                time.sleep(max(event["time"] - before, 0) / speed)
            before = event["time"]
            yield event


def parse(payload: bytes) -> Event:
    """One event from its JSON.

    Raises:
        ValueError: it is none, or of another version of the schema.
    """
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"an event must be a JSON object, got {payload[:60]!r}") from error
    if not isinstance(event, dict) or event.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"an event must have schema {SCHEMA_VERSION}, got {payload[:60]!r}; use the version of "
            "sglang-multipole that the server runs"
        )
    missing = {"run", "seq", "time", "event", "dropped"} - event.keys()
    if missing:
        raise ValueError(f"an event must have {', '.join(sorted(missing))}, got {payload[:60]!r}")
    return event
