"""The event stream: ZeroMQ PUB, JSON payloads, sequence numbers. docs/events.md is the schema.

Publishing never waits: events go into a bounded queue, which a thread of its own empties; what
finds it full is dropped and counted, and its sequence number is missing. ZeroMQ drops for each
subscriber that is too slow, which it sees by the same gaps.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import queue
import secrets
import socket
import threading
import time
from typing import Any

import orjson
import zmq

SCHEMA_VERSION = 1
TOPIC_PREFIX = "multipole."
QUEUE_EVENTS = 1024
HEARTBEAT_SECONDS = 1.0
CLOSE_SECONDS = 0.5


class EventPublisher:
    """Offers events at an address.

    Attributes:
        dropped: events that found the queue full.

    Raises:
        RuntimeError: the address cannot be had.
    """

    def __init__(
        self,
        endpoint: str,
        queue_events: int = QUEUE_EVENTS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ):
        self.endpoint, self.dropped = endpoint, 0
        self._run = secrets.token_hex(4)
        self._heartbeat_seconds = heartbeat_seconds
        self._sequence = itertools.count()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_events)
        # numbers must enter the queue in their order
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.linger = int(CLOSE_SECONDS * 1000)
        self._socket.ipv6 = True
        try:
            _require_no_listener(endpoint)
            self._socket.bind(endpoint)
        except (OSError, zmq.ZMQError) as error:
            self._socket.close()
            self._context.term()
            raise RuntimeError(
                f"events_endpoint: the address must be free and of this machine, got {endpoint} "
                f"({error.strerror}); choose another"
            ) from error
        self._thread = threading.Thread(target=self._send_all, name="multipole-events", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def publish(self, event: str, **fields: Any) -> None:
        """Hand one event over; returns at once."""
        with self._lock:
            message = {
                "schema": SCHEMA_VERSION,
                "run": self._run,
                "seq": next(self._sequence),
                "time": time.time(),
                "event": event,
                "dropped": self.dropped,
                **fields,
            }
            try:
                self._queue.put_nowait(message)
            except queue.Full:
                self.dropped += 1

    def close(self) -> None:
        """Send what is queued and a last `stop`, for at most about CLOSE_SECONDS."""
        if not self._thread.is_alive():
            return
        atexit.unregister(self.close)
        self.publish("stop")
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _send_all(self) -> None:
        while True:
            try:
                message = self._queue.get(timeout=self._heartbeat_seconds)
            except queue.Empty:
                self.publish("heartbeat")
                continue
            if message is None:
                break
            topic = (TOPIC_PREFIX + message["event"]).encode()
            # default=str: a value that JSON does not know must not end the stream
            payload = orjson.dumps(message, default=str)
            self._socket.send_multipart([topic, payload])
        self._socket.close()
        self._context.term()


def _require_no_listener(endpoint: str) -> None:
    """ZeroMQ takes the name of a Unix socket from whoever listens on it; refuse that.

    Raises:
        OSError: somebody listens.
    """
    path = endpoint.removeprefix("ipc://")
    if path == endpoint:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # no such file, or what a killed server left behind
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
