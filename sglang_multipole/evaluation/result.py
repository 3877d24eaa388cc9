"""One row of the table: a task at a length, with what its answers add up to."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

from sglang_multipole.evaluation.runner import Outcome
from sglang_multipole.evaluation.task import Prompt

# a task that the dense server cannot do tells nothing about what sparse attention loses
EVIDENCE_ACCURACY = 0.5


@dataclasses.dataclass
class TaskResult:
    """What one task gave.

    Attributes:
        accuracy: mean over samples of the mean over their answered repeats; None if none was.
        standard_error: of the accuracy, over samples; None for fewer than two.
        truncated: fraction of answered requests that ended at max_tokens.
        prompts_digest: equal for equal prompts, so that two runs can be compared pairwise.
    """

    task: str
    length: int | None
    samples: int
    repeats: int
    max_tokens: int
    prompts_digest: str
    shortened: int
    accuracy: float | None
    standard_error: float | None
    failed: int
    truncated: float | None
    output_tokens: float | None
    prompt_tokens: float | None
    answers: list[dict[str, Any]]
    baseline_accuracy: float | None = None
    difference: float | None = None
    difference_standard_error: float | None = None
    evidence: bool | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def compare(self, baseline: dict[str, Any] | None) -> None:
        """Set beside it the dense server's result, a row of its JSON; None is none."""
        if baseline is None:
            self.note = "not in the baseline"
            return
        self.baseline_accuracy = baseline["accuracy"]
        if self.baseline_accuracy is None:
            self.note = "the baseline has no answers"
            return
        self.evidence = self.baseline_accuracy >= EVIDENCE_ACCURACY
        if baseline["prompts_digest"] != self.prompts_digest:
            self.note = "the baseline asked other prompts"
            return
        # the same samples: the difference is taken sample by sample
        own, dense = sample_means(self.answers), sample_means(baseline["answers"])
        differences = [own[sample] - dense[sample] for sample in own if sample in dense]
        self.difference, self.difference_standard_error = mean_and_error(differences)


def summarise(
    task: str,
    length: int | None,
    prompts: Sequence[Prompt],
    outcomes: Sequence[Outcome],
    max_tokens: int,
) -> TaskResult:
    """Add up the outcomes; those that failed are counted, and are in no mean."""
    answers = [_answer_to_dict(outcome) for outcome in outcomes]
    answered = [outcome.answer for outcome in outcomes if outcome.score is not None]
    accuracy, error = mean_and_error(list(sample_means(answers).values()))
    return TaskResult(
        task=task,
        length=length,
        samples=len(prompts),
        repeats=len(outcomes) // len(prompts),
        max_tokens=max_tokens,
        prompts_digest=digest(prompts),
        shortened=sum(prompt.shortened for prompt in prompts),
        accuracy=accuracy,
        standard_error=error,
        failed=len(outcomes) - len(answered),
        truncated=_mean([float(answer.finish_reason == "length") for answer in answered]),
        output_tokens=_mean([answer.output_tokens for answer in answered]),
        prompt_tokens=_mean([answer.prompt_tokens for answer in answered]),
        answers=answers,
    )


def sample_means(answers: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean score of each sample over its answered repeats; without samples that have none."""
    scores: dict[int, list[float]] = {}
    for answer in answers:
        if answer["score"] is not None:
            scores.setdefault(answer["sample"], []).append(answer["score"])
    return {sample: sum(values) / len(values) for sample, values in scores.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    mean = _mean(values)
    if mean is None or len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' texts and references."""
    text = "\0".join(f"{prompt.text}\0{prompt.reference!r}" for prompt in prompts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _answer_to_dict(outcome: Outcome) -> dict[str, Any]:
    return {
        "sample": outcome.sample,
        "repeat": outcome.repeat,
        "score": outcome.score,
        "reference": outcome.reference,
        **dataclasses.asdict(outcome.answer),
    }
