"""The tables on the terminal, and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_multipole.evaluation.result import EVIDENCE_ACCURACY, TaskResult
from sglang_multipole.evaluation.server_activity import Totals

VERSION = 1
SHOWN_ERRORS = 3
MIN_WIDTH = 120  # columns, where the output is no terminal


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not fold the table when it is written to a file."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, MIN_WIDTH)
    return console


def print_results(console: Console, results: Sequence[TaskResult], *, compared: bool) -> None:
    """One line a task; with a baseline, the columns that compare."""
    table = Table()
    for title in ("task", "length", "answers", "accuracy"):
        table.add_column(title, justify="left" if title == "task" else "right")
    if compared:
        table.add_column("dense", justify="right")
        table.add_column("difference", justify="right")
    for title in ("output tokens", "truncated", "failed"):
        table.add_column(title, justify="right")
    if compared:
        table.add_column("evidence")
    for result in results:
        cells = [
            result.task,
            "-" if result.length is None else str(result.length),
            f"{result.samples} x {result.repeats}",
            _percent(result.accuracy, result.standard_error),
        ]
        if compared:
            cells.append(_percent(result.baseline_accuracy))
            cells.append(_percent(result.difference, result.difference_standard_error))
        cells.append("-" if result.output_tokens is None else f"{result.output_tokens:.0f}")
        cells.append(_percent(result.truncated))
        cells.append(f"[red]{result.failed}[/red]" if result.failed else "0")
        if compared:
            cells.append({None: "?", True: "yes", False: "[red]no[/red]"}[result.evidence])
        table.add_row(*cells)
    console.print(table)
    for result in results:
        name = result.task if result.length is None else f"{result.task} {result.length}"
        if result.evidence is False:
            console.print(
                f"{name}: no evidence: dense is right in {_percent(result.baseline_accuracy)}, "
                f"under {EVIDENCE_ACCURACY:.0%}"
            )
        if result.note:
            console.print(f"{name}: {result.note}")
        if result.shortened:
            console.print(f"{name}: {result.shortened} contexts were cut to the length")
        print_errors(console, result)


def print_errors(console: Console, result: TaskResult) -> None:
    """Why requests failed, each reason once."""
    errors = [answer["error"] for answer in result.answers if answer["error"]]
    reasons = sorted(set(errors), key=errors.count, reverse=True)
    for reason in reasons[:SHOWN_ERRORS]:
        console.print(
            f"{result.task}: {errors.count(reason)} failed: {reason}", style="red", markup=False
        )
    if len(reasons) > SHOWN_ERRORS:
        console.print(f"{result.task}: and {len(reasons) - SHOWN_ERRORS} other reasons")


def print_divergences(console: Console, summaries: Sequence[dict[str, Any]]) -> None:
    """One line a task: how far the answers' tokens are from the dense server's."""
    table = Table(title="against the dense answers, token by token")
    for title in ("task", "length", "answers", "KL (nats, ≥)", "top-1"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for title in ("gain", "identical", "differs at", "places", "failed"):
        table.add_column(title, justify="right")
    for row in summaries:
        error = row["kl_standard_error"]
        places = f"{row['places']}"
        if row["sparse_places"] is not None:
            places += f" ({row['sparse_places']} sparse)"
        if row["not_forced"]:
            places += f", {row['not_forced']} left out"
        table.add_row(
            row["task"],
            "-" if row["length"] is None else str(row["length"]),
            str(row["answers"]),
            _number(row["kl"]) + ("" if error is None else f" ± {error:.2g}"),
            _percent(row["top1_agreement"]),
            _number(row["log_prob_gain"]),
            str(row["identical"]),
            _number(row["first_difference"]),
            places,
            f"[red]{row['failed']}[/red]" if row["failed"] else "0",
        )
    console.print(table)


def print_activity(console: Console, activity: Totals | None) -> None:
    """What the server says it did meanwhile."""
    if activity is None:
        console.print("multipole attention: the server reports none")
        return
    share = "no steps" if activity.share_read is None else f"{activity.share_read:.1%}"
    console.print(
        f"multipole attention: {activity.sparse_steps} sparse steps, {activity.dense_steps} dense; "
        f"share of the context read exactly: {share}"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write at once: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    text = json.dumps({"version": VERSION, **content}, indent=1, ensure_ascii=False)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def read_baseline(path: Path) -> dict[tuple[str, int | None], dict[str, Any]]:
    """The rows of a file made by --json, by task and length.

    Raises:
        ValueError: the file is none of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        if (content["activity"] or {}).get("sparse_steps"):
            raise ValueError("its server decoded sparsely")
        rows = {(row["task"], row["length"]): row for row in content["tasks"]}
        for row in rows.values():
            _ = row["accuracy"], row["prompts_digest"], row["answers"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"eval: --baseline must be a file made by --json against a dense server, got {path} "
            f"({error!r})"
        ) from error
    return rows


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
