"""What every task is, and what tasks share: prompts of an exact length, and reading answers."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

FIRST_SIZE = 16  # of the haystack, tried first


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: the context, then the question.
        reference: what `score` compares an answer with; plain JSON.
        answer_prefix: the words an answer begins with; sent where the prompt is to be completed,
            left out where a chat template ends the prompt.
        shortened: whether a part of the context was cut out to fit the length.
    """

    text: str
    reference: Any
    answer_prefix: str = ""
    shortened: bool = False


class Tokenizer(Protocol):
    """Counts tokens as the server will."""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the whole request, with whatever the server puts around the prompt."""


class Task(Protocol):
    """One kind of question; a module of `tasks` has one.

    Attributes:
        name: as in --task and in the table.
        max_tokens: of an answer, unless the user says otherwise.
    """

    name: str
    max_tokens: int

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """Make `samples` prompts of at most `length` tokens; the same for the same seed.

        Raises:
            ValueError: the length is too short for the question, or too long for the task.
        """

    def score(self, answer: str, reference: Any) -> float:
        """How right the answer is, from 0 to 1."""


def make_rng(*parts: object) -> random.Random:
    """A random generator that depends on `parts` alone: sample 7 is always sample 7."""
    return random.Random("/".join(str(part) for part in parts))


def fit(build: Callable[[int], Prompt], length: int, tokenizer: Tokenizer, who: str) -> Prompt:
    """The prompt with the largest haystack that has at most `length` tokens.

    Args:
        build: makes the prompt with a haystack of the given size, from 0; a larger one is longer.
        length: tokens.
        who: the task, for the message.

    Raises:
        ValueError: even an empty haystack is longer.
    """
    tokens = {0: len(tokenizer.encode(build(0)))}
    if tokens[0] > length:
        raise ValueError(
            f"{who}: the prompt must have room for {tokens[0]} tokens, which it has without any "
            f"haystack, got {length}; give a larger --length"
        )
    fits, too_large, size = 0, 0, FIRST_SIZE
    interpolate = True
    while too_large - fits != 1:
        tokens[size] = len(tokenizer.encode(build(size)))
        if tokens[size] <= length:
            fits = size
        else:
            too_large = size
        if not too_large:
            size = 2 * fits
            continue
        # tokens grow almost evenly: a line through both ends is near; the half bounds the steps
        share = (length - tokens[fits]) / (tokens[too_large] - tokens[fits]) if interpolate else 0.5
        interpolate = not interpolate
        size = fits + min(max(1, round(share * (too_large - fits))), too_large - fits - 1)
    return build(fits)


def require_length(length: int | None, reserved: int, who: str) -> int:
    """Tokens left for the prompt when `reserved` are kept for the answer.

    Raises:
        ValueError: no length is given, or nothing is left.
    """
    if length is None or length <= reserved:
        raise ValueError(
            f"{who}: the length must be above {reserved} tokens, got {length}; give --length"
        )
    return length - reserved


def strip_reasoning(answer: str) -> str:
    """What follows the model's thinking; nothing if the thinking never ended."""
    thinking, mark, final = answer.rpartition("</think>")
    if mark:
        return final
    return "" if "<think>" in answer else answer


def fraction_found(answer: str, references: Sequence[str]) -> float:
    """Fraction of the references that are in the answer, in upper or lower case (RULER's rule)."""
    text = strip_reasoning(answer).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def last_boxed(answer: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched; None if there is none."""
    content = None
    for match in re.finditer(r"\\f?boxed\s*\{", answer):
        depth = 1
        for end in range(match.end(), len(answer)):
            depth += {"{": 1, "}": -1}.get(answer[end], 0)
            if depth == 0:
                content = answer[match.end() : end]
                break
    return content
