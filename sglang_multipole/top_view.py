"""How `sglang-multipole top` shows what it knows: a screen, or lines without a terminal."""

from __future__ import annotations

import statistics
import time

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_multipole.top_state import TopState

_BARS = " ▁▂▃▄▅▆▇█"
_QUIET_SECONDS = 3.0  # without an event, though heartbeats come every second


def line(state: TopState) -> str:
    """One line of plain text."""
    clock = time.strftime("%H:%M:%S", time.localtime(state.time))
    step_ms = f"{state.step_ms[-1]:.1f} ms" if state.step_ms else "-"
    return (
        f"{clock} requests {state.num_requests} (sparse {state.num_sparse_requests}) "
        f"steps {state.steps} step {step_ms} read {100 * state.share_read:.1f} % "
        f"pool {_pool(state)} built {state.segments['built']} shared {state.segments['shared']} "
        f"evicted {state.segments['evicted']} finished {state.num_finished} lost {state.lost}"
    )


def screen(state: TopState, where: str, now: float | None) -> RenderableType:
    """The whole screen.

    Args:
        where: address or file that the events come from.
        now: Unix time in seconds; None when a recording is shown.
    """
    return Panel(
        Group(_figures(state), Text(), _requests(state), Text(), _finished(state)),
        title=Text(f"multipole attention: {state.model or where}"),
        subtitle=Text(_status(state, where, now)),
        box=box.ROUNDED,
    )


def _figures(state: TopState) -> Table:
    table = Table.grid(padding=(0, 3))
    dense = ", ".join(f"{reason} {count}" for reason, count in state.dense_steps.items() if count)
    segments = state.segments
    rows = [
        ("requests", f"{state.num_requests}, sparse {state.num_sparse_requests}"),
        ("read", f"{100 * state.share_read:.1f} % of {state.context_tokens} tokens of context"),
        ("steps", f"{state.steps}; sparse rows {state.sparse_steps}; dense rows: {dense or 0}"),
        ("step time", _step_times(state)),
        ("pool", f"{_pool(state)} places, {state.pool.get('bytes', 0) / 2**30:.3f} GiB"),
        (
            "segments",
            f"built {segments['built']}, shared {segments['shared']}, "
            f"evicted {segments['evicted']}, open clustered {segments['open_builds']} times, "
            f"{state.recluster_ms / 1000:.1f} s",
        ),
    ]
    if state.audits:
        rows.append(("audit", _audit(state)))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _audit(state: TopState) -> str:
    return (
        f"relative error {state.relative_error / state.audits:.4f}, "
        f"mass covered {100 * state.mass_covered / state.audits:.1f} %, "
        f"means of {state.audits} audited steps"
    )


def _requests(state: TopState) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column("request", no_wrap=True, ratio=1)
    for name in ("context", "read", "share", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in state.requests:
        share = 100 * row["exact_tokens"] / max(row["context_tokens"], 1)
        budget = "off" if row["token_budget"] is None else str(row["token_budget"])
        table.add_row(
            Text(str(row["rid"])),
            str(row["context_tokens"]),
            str(row["exact_tokens"]),
            f"{share:.1f} %" if row["sparse"] else "dense",
            budget,
        )
    return table


def _finished(state: TopState) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    table.add_column(f"finished ({state.num_finished})", no_wrap=True, ratio=1)
    for name in ("prompt", "answer", "sparse steps", "read"):
        table.add_column(name, justify="right", no_wrap=True)
    for event in state.finished:
        activity = event["activity"]
        share = 100 * activity["exact_tokens"] / max(activity["context_tokens"], 1)
        table.add_row(
            Text(str(event["rid"])),
            str(event["prompt_tokens"]),
            str(event["completion_tokens"]),
            str(activity["sparse_steps"]),
            f"{share:.1f} %",
        )
    return table


def _pool(state: TopState) -> str:
    pool = state.pool
    if not pool:
        return "-"
    return f"{pool['places'] - pool['free']}/{pool['places']}"


def _step_times(state: TopState) -> str:
    if not state.step_ms:
        return "-"
    # one step in which much is clustered must not flatten all others
    full = 2 * statistics.median(state.step_ms) or 1.0
    bars = "".join(_BARS[round(min(ms / full, 1) * (len(_BARS) - 1))] for ms in state.step_ms)
    return f"{state.step_ms[-1]:.1f} ms  {bars}"


def _status(state: TopState, where: str, now: float | None) -> str:
    parts = [f"event {state.seq}" if state.seq >= 0 else "no event yet"]
    if state.lost:
        parts.append(f"{state.lost} lost ({state.dropped} dropped by the server)")
    if state.is_stopped:
        parts.append("the server has stopped")
    elif now is not None and state.seq >= 0 and now - state.time > _QUIET_SECONDS:
        parts.append(f"nothing for {now - state.time:.0f} s: the server is gone, or paused")
    # the address is cut first where the terminal is narrow
    return " | ".join([*parts, where])
