"""AIME from a local JSONL file: problems whose answer is an integer from 0 to 999."""

from __future__ import annotations

import re
from typing import Any

from sglang_multipole.evaluation.file_task import FileTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, last_boxed, strip_reasoning

ANSWER_TOKENS = 16384
MAX_ANSWER = 999


class Aime(FileTask):
    """Solve for an integer."""

    name = "aime"
    max_tokens = ANSWER_TOKENS
    fields = ("problem", "answer")

    def check_row(self, row: dict[str, Any], where: str) -> None:
        if not re.fullmatch(r"\d{1,3}", str(row["answer"]).strip()):
            raise ValueError(
                f"aime: an answer must be an integer from 0 to {MAX_ANSWER}, got "
                f"{row['answer']!r} in {where}; take --format math for other answers"
            )

    def make_prompt(self, row: dict[str, Any], length: int | None, tokenizer: Tokenizer) -> Prompt:
        text = (
            f"{row['problem']}\n\nThe answer is an integer from 0 to {MAX_ANSWER}. Reason step by "
            r"step, and put the final answer within \boxed{}."
        )
        return Prompt(text, int(row["answer"]))

    def score(self, answer: str, reference: Any) -> float:
        """1 if the answer's integer is the right one."""
        return float(final_integer(answer) == reference)


def final_integer(answer: str) -> int | None:
    r"""The integer in the last \boxed{}, else the last one of the text; None if there is none."""
    text = strip_reasoning(answer)
    boxed = last_boxed(text)
    numbers = re.findall(r"\d+", (text if boxed is None else boxed).replace(",", ""))
    return int(numbers[-1]) if numbers else None
