r"""MATH from a local JSONL file: problems whose answer is a formula, given in \boxed{}."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from sglang_multipole.evaluation.file_task import FileTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, last_boxed, strip_reasoning

ANSWER_TOKENS = 4096

# what changes the look of a formula and not its meaning
IGNORED = re.compile(r"\\left|\\right|\\[!,;: ]|\\displaystyle|\\%|[\s$%]|\^\\circ|\^\{\\circ\}")
UNITS = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
FRACTION = re.compile(r"(-?)\\[dt]?frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d))")


class MathBoxed(FileTask):
    """Solve for a formula."""

    name = "math"
    max_tokens = ANSWER_TOKENS
    fields = ("problem",)

    def check_row(self, row: dict[str, Any], where: str) -> None:
        if _answer_of(row) is None:
            raise ValueError(
                r"math: a row must have an answer, or a solution with \boxed{}, got neither in "
                f"{where}"
            )

    def make_prompt(self, row: dict[str, Any], length: int | None, tokenizer: Tokenizer) -> Prompt:
        text = (
            f"{row['problem']}\n\nReason step by step, and put the final answer within "
            r"\boxed{}."
        )
        return Prompt(text, str(_answer_of(row)))

    def score(self, answer: str, reference: Any) -> float:
        """1 if the boxed formula is the right one, written alike or of the same value."""
        boxed = last_boxed(strip_reasoning(answer))
        return float(boxed is not None and are_equal(boxed, reference))


def are_equal(first: str, second: str) -> bool:
    """Whether two formulas are the same once normalised, or numbers of the same value."""
    first, second = normalise(first), normalise(second)
    if first == second:
        return True
    values = _value(first), _value(second)
    return None not in values and values[0] == values[1]


def normalise(formula: str) -> str:
    """The formula without spaces, sizes, units and thousands' commas."""
    formula = UNITS.sub(lambda unit: "" if _follows_number(formula, unit) else unit[1], formula)
    formula = IGNORED.sub("", formula).rstrip(".")
    formula = re.sub(r"\\[dt]frac", r"\\frac", formula)
    # "x = 5" where 5 is asked for
    formula = re.sub(r"^[a-zA-Z]=", "", formula).replace("{,}", ",")
    # of a number alone: (1,200) is a pair
    return formula.replace(",", "") if THOUSANDS.fullmatch(formula) else formula


def _follows_number(formula: str, unit: re.Match[str]) -> bool:
    return formula[: unit.start()].rstrip(" \\").endswith(tuple("0123456789}"))


def _value(formula: str) -> Fraction | None:
    match = FRACTION.fullmatch(formula)
    if match:
        sign, numerator, denominator, digit, divisor = match.groups()
        formula = f"{sign}{numerator or digit}/{denominator or divisor}".replace("--", "")
    try:
        return Fraction(formula)
    except (ValueError, ZeroDivisionError):
        return None


def _answer_of(row: dict[str, Any]) -> Any:
    answer = row.get("answer")
    return last_boxed(str(row.get("solution", ""))) if answer is None else answer
