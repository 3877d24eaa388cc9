"""How the examples show what multipole attention did for an answer."""

from __future__ import annotations

import json
import urllib.request

KEYS = (
    "sparse_steps",
    "dense_steps",
    "exact_tokens",
    "context_tokens",
    "segments_built",
    "segments_shared",
)


def describe(activity: dict[str, int] | None) -> str:
    """One line of the counters in meta_info["multipole"]."""
    if activity is None:
        return "[no multipole counters: this server attends densely]"
    return "[" + ", ".join(f"{key} {activity.get(key, '?')}" for key in KEYS) + "]"


def of_server(url: str) -> dict[str, int] | None:
    """The sums over all requests so far, from /server_info; None from a dense server.

    A streamed answer of the OpenAI API has no meta_info: the sums before and after it are its part,
    if nobody else asks at the same time.
    """
    with urllib.request.urlopen(f"{url}/server_info", timeout=60) as response:
        states = json.load(response)["internal_states"]
    reports = [state.get("multipole") for state in states]
    if not all(reports):
        return None
    return {key: sum(report["totals"][key] for report in reports) for key in KEYS}


def grown(before: dict[str, int] | None, after: dict[str, int] | None) -> dict[str, int] | None:
    """What was added between two calls of of_server."""
    if before is None or after is None:
        return None
    return {key: after[key] - before[key] for key in KEYS}
