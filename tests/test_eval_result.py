"""Results: means over samples of means over repeats, with the standard error over samples."""

from __future__ import annotations

import math

import pytest

from sglang_multipole.evaluation.client import Answer
from sglang_multipole.evaluation.result import mean_and_error, summarise
from sglang_multipole.evaluation.runner import Outcome
from sglang_multipole.evaluation.task import Prompt

PROMPTS = [Prompt("a", "1"), Prompt("b", "2"), Prompt("c", "3", shortened=True)]


def outcome(sample: int, repeat: int, score: float | None, **answer: object) -> Outcome:
    error = "gone" if score is None else None
    return Outcome(sample, repeat, Answer(error=error, **answer), score, "")


def test_accuracy_is_the_mean_over_samples_of_the_mean_over_repeats() -> None:
    scores = {0: [1, 1], 1: [1, 0], 2: [0, 0]}
    row = summarise(
        "t",
        100,
        PROMPTS,
        [
            outcome(sample, i, score)
            for sample, both in scores.items()
            for i, score in enumerate(both)
        ],
        32,
    )
    assert (row.samples, row.repeats, row.shortened) == (3, 2, 1)
    assert row.accuracy == 0.5
    # of 1, 0.5, 0: not of six independent answers
    assert row.standard_error == pytest.approx(0.5 / math.sqrt(3))


def test_failed_requests_are_counted_and_change_no_mean() -> None:
    outcomes = [
        outcome(0, 0, 1.0, output_tokens=10, finish_reason="stop"),
        outcome(1, 0, None),
        outcome(2, 0, 0.0, output_tokens=30, finish_reason="length"),
    ]
    row = summarise("t", None, PROMPTS, outcomes, 32)
    assert (row.failed, row.accuracy, row.output_tokens, row.truncated) == (1, 0.5, 20, 0.5)
    assert row.answers[1]["error"] == "gone"
    assert row.answers[1]["score"] is None


def test_no_answer_at_all_is_no_accuracy() -> None:
    row = summarise("t", None, PROMPTS, [outcome(sample, 0, None) for sample in range(3)], 32)
    assert (row.failed, row.accuracy, row.standard_error, row.truncated) == (3, None, None, None)


def test_the_digest_is_that_of_the_prompts() -> None:
    def digest(prompts: list[Prompt]) -> str:
        return summarise("t", None, prompts, [], 32).prompts_digest

    assert digest(PROMPTS) == digest(list(PROMPTS))
    assert digest(PROMPTS) != digest([*PROMPTS[:2], Prompt("c", "4")])


def test_one_value_has_no_standard_error() -> None:
    assert mean_and_error([]) == (None, None)
    assert mean_and_error([0.5]) == (0.5, None)
