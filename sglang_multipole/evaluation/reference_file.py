"""The file of a dense server's greedy answers, and the table of how far another server is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_multipole.evaluation.divergence import DenseAnswer, Divergence
from sglang_multipole.evaluation.result import mean_and_error

VERSION = 1


@dataclasses.dataclass(frozen=True)
class ReferenceTask:
    """The dense answers to one task's prompts."""

    task: str
    length: int | None
    answers: list[DenseAnswer]


def write(path: Path, tasks: Sequence[ReferenceTask]) -> None:
    """Write the answers as JSON."""
    content = {"version": VERSION, "tasks": [dataclasses.asdict(task) for task in tasks]}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read(path: Path) -> list[ReferenceTask]:
    """Read what `write` wrote.

    Raises:
        ValueError: the file is none of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return [
            ReferenceTask(
                task["task"], task["length"], [DenseAnswer(**answer) for answer in task["answers"]]
            )
            for task in content["tasks"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"eval: --reference must be a file made by --save-reference, got {path} ({error!r})"
        ) from error


def summarise(task: ReferenceTask, divergences: Sequence[Divergence | None]) -> dict[str, Any]:
    """Means over the answers; a failed one is None, counted, and in no mean.

    An answer counts as much as any other, however long; standard errors are over answers.
    """
    known = [divergence for divergence in divergences if divergence is not None]
    forced = [divergence for divergence in known if divergence.kl]
    kl, kl_error = mean_and_error([sum(d.kl) / len(d.kl) for d in forced])
    agreement, _ = mean_and_error([sum(d.agrees) / len(d.agrees) for d in forced])
    gain, _ = mean_and_error([sum(d.log_prob_gain) / len(d.log_prob_gain) for d in forced])
    steps = [step for divergence in known for step in divergence.sparse]
    return {
        "task": task.task,
        "length": task.length,
        "answers": len(divergences),
        "failed": len(divergences) - len(known),
        "kl": kl,
        "kl_standard_error": kl_error,
        "top1_agreement": agreement,
        "log_prob_gain": gain,
        "identical": sum(divergence.first_difference is None for divergence in known),
        "first_difference": mean_and_error(
            [d.first_difference for d in known if d.first_difference is not None]
        )[0],
        "places": sum(len(divergence.kl) for divergence in known),
        "sparse_places": None if None in steps else sum(map(bool, steps)),
        "not_forced": sum(divergence.not_forced for divergence in known),
        "details": [None if d is None else dataclasses.asdict(d) for d in divergences],
    }
