"""What a multipole server says it did between two moments."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from sglang_multipole.evaluation.client import Client, RequestError

POLL_SECONDS = 0.5
REST_SECONDS = 30.0  # until the counters must have come to rest

COUNTERS = ("sparse_steps", "dense_steps", "exact_tokens", "context_tokens")


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the server's life and its data-parallel ranks; see activity.Activity."""

    sparse_steps: int
    dense_steps: int
    exact_tokens: int
    context_tokens: int

    def since(self, before: Totals) -> Totals:
        """What was added after `before` was read."""
        return Totals(*(getattr(self, name) - getattr(before, name) for name in COUNTERS))

    @property
    def share_read(self) -> float | None:
        """Tokens attended exactly among all tokens there were; None before any step."""
        return self.exact_tokens / self.context_tokens if self.context_tokens else None

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share_read": self.share_read}


def read_totals(client: Client) -> Totals | None:
    """The counters now; None if the server has none, or cannot be asked."""
    reports = _reports(client)
    if not reports:
        return None
    return Totals(*(sum(report["totals"].get(name, 0) for report in reports) for name in COUNTERS))


def read_settled_totals(client: Client) -> Totals | None:
    """The counters once two readings agree: the last steps are counted after their answers."""
    deadline = time.monotonic() + REST_SECONDS
    totals = read_totals(client)
    while totals is not None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        if totals == (totals := read_totals(client)):
            break
    return totals


def read_config(client: Client) -> dict[str, Any] | None:
    """The configuration of multipole attention; None if it is not active."""
    reports = _reports(client)
    return reports[0].get("config") if reports else None


def _reports(client: Client) -> list[dict[str, Any]]:
    try:
        states = client.get("/server_info").get("internal_states") or []
        reports = [state.get("multipole") for state in states]
    except (RequestError, AttributeError, TypeError):
        return []
    return [report for report in reports if isinstance(report, dict) and "totals" in report]
