"""AIME from a local JSONL file: problems whose answer is an integer from 0 to 999."""

from __future__ import annotations

import re
from typing import Any

from sglang_multipole.evaluation.task import Prompt, Tokenizer, last_boxed, strip_reasoning
from sglang_multipole.evaluation.tasks.rows import read_rows

ANSWER_TOKENS = 16384
MAX_ANSWER = 999
FIELDS = ("problem", "answer")


class Aime:
    """Solve for an integer."""

    name = "aime"
    max_tokens = ANSWER_TOKENS

    def __init__(self, path: str):
        self._path = path

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """The file's first rows; length and seed change nothing."""
        rows = read_rows(self._path, FIELDS)[:samples]
        return [_make_prompt(row, number, self._path) for number, row in enumerate(rows, start=1)]

    def score(self, answer: str, reference: Any) -> float:
        """1 if the answer's integer is the right one."""
        return float(final_integer(answer) == reference)


def final_integer(answer: str) -> int | None:
    r"""The integer in the last \boxed{}, else the last one of the text; None if there is none."""
    text = strip_reasoning(answer)
    boxed = last_boxed(text)
    numbers = re.findall(r"\d+", (text if boxed is None else boxed).replace(",", ""))
    return int(numbers[-1]) if numbers else None


def _make_prompt(row: dict[str, Any], number: int, path: str) -> Prompt:
    answer = str(row["answer"]).strip()
    if not re.fullmatch(r"\d{1,3}", answer):
        raise ValueError(
            f"aime: an answer must be an integer from 0 to {MAX_ANSWER}, got {row['answer']!r} in "
            f"row {number} of {path}; take --format math for other answers"
        )
    text = (
        f"{row['problem']}\n\nThe answer is an integer from 0 to {MAX_ANSWER}. Reason step by "
        r"step, and put the final answer within \boxed{}."
    )
    return Prompt(text, int(answer))
