"""What `sglang-multipole top` knows: the events so far, summed up."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

NUM_STEP_TIMES = 60  # step events kept for the step-time line
NUM_FINISHED = 5


@dataclasses.dataclass
class TopState:
    """Sums since the server's start event, or since the view began.

    lost: events whose numbers were missing; dropped: of these, by the server's own queue.
    relative_error, mass_covered: sums over the audits.
    """

    run: str = ""
    model: str = ""
    seq: int = -1
    time: float = 0.0
    lost: int = 0
    dropped: int = 0
    is_stopped: bool = False
    steps: int = 0
    sparse_steps: int = 0
    dense_steps: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    exact_tokens: int = 0
    context_tokens: int = 0
    segments: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    recluster_ms: float = 0.0
    audits: int = 0
    relative_error: float = 0.0
    mass_covered: float = 0.0
    pool: dict[str, int] = dataclasses.field(default_factory=dict)
    num_requests: int = 0
    num_sparse_requests: int = 0
    requests: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    step_ms: collections.deque[float] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=NUM_STEP_TIMES)
    )
    num_finished: int = 0
    finished: collections.deque[dict[str, Any]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=NUM_FINISHED)
    )

    def apply(self, event: dict[str, Any]) -> None:
        """Take one event in."""
        if event["run"] != self.run:
            # another server, or the same one started again
            self.__init__(run=event["run"], seq=event["seq"] - 1)
        self.lost += max(event["seq"] - self.seq - 1, 0)
        self.seq, self.time, self.dropped = event["seq"], event["time"], event["dropped"]
        take_in = getattr(self, f"_on_{event['event']}", None)
        # an event that is not known is one of a later version's
        if take_in is not None:
            take_in(event)

    @property
    def share_read(self) -> float:
        """Part of the context attended exactly, 0 to 1."""
        return self.exact_tokens / self.context_tokens if self.context_tokens else 1.0

    def _on_start(self, event: dict[str, Any]) -> None:
        self.model, self.pool = event["model"], event["pool"]

    def _on_stop(self, event: dict[str, Any]) -> None:
        self.is_stopped = True

    def _on_step(self, event: dict[str, Any]) -> None:
        self.steps += event["steps"]
        self.sparse_steps += event["sparse_steps"]
        self.dense_steps.update(event["dense_steps"])
        self.exact_tokens += event["exact_tokens"]
        self.context_tokens += event["context_tokens"]
        self.recluster_ms += event["recluster_ms"]
        self.pool, self.requests = event["pool"], event["requests"]
        self.num_requests = event["num_requests"]
        self.num_sparse_requests = event["num_sparse_requests"]
        if event["steps"]:
            self.step_ms.append(event["step_ms"])

    def _on_segments(self, event: dict[str, Any]) -> None:
        for name in ("built", "shared", "evicted", "open_builds"):
            self.segments[name] += event[name]

    def _on_audit(self, event: dict[str, Any]) -> None:
        self.audits += 1
        self.relative_error += event["relative_error"]
        self.mass_covered += event["mass_covered"]

    def _on_request(self, event: dict[str, Any]) -> None:
        self.num_finished += 1
        self.finished.appendleft(event)
        ended = [row for row in self.requests if row["rid"] == event["rid"]]
        self.requests = [row for row in self.requests if row["rid"] != event["rid"]]
        self.num_requests -= len(ended)
        self.num_sparse_requests -= sum(row["sparse"] for row in ended)
