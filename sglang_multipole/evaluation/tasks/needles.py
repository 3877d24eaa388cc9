"""What the needle tasks share: sentences that give a value to a key, and the question for one."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

from sglang_multipole.evaluation import words
from sglang_multipole.evaluation.task import Prompt

ANSWER_TOKENS = 128  # RULER's
VALUE_DIGITS = 7

NewText = Callable[[], str]


def needle(kind: str, key: str, value: str) -> str:
    """The sentence that is to be found; kind is "number" or "uuid"."""
    return f"One of the special magic {kind}s for {key} is: {value}."


def new_number(rng: random.Random) -> str:
    """A number of VALUE_DIGITS digits."""
    return str(rng.randrange(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS))


def new_uuid(rng: random.Random) -> str:
    """A random UUID (version 4)."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def word_keys(rng: random.Random) -> NewText:
    """A function that gives another adjective-noun at every call, until there are no more."""
    numbers = list(range(words.NUM_KEYS))
    rng.shuffle(numbers)

    def next_key() -> str:
        if not numbers:
            raise ValueError(
                f"needles: the haystack must have at most {words.NUM_KEYS} keys, got more; give a "
                "smaller --length, or take niah_multikey_3, whose keys never end"
            )
        return words.key(numbers.pop())

    return next_key


def make_prompt(kind: str, key: str, value: str, context: str) -> Prompt:
    """The context between RULER's instruction and its question."""
    text = (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"What is the special magic {kind} for {key} mentioned in the provided text?"
    )
    prefix = f" The special magic {kind} for {key} mentioned in the provided text is"
    return Prompt(text, [value], prefix)


class NeedleHaystack:
    """A prompt whose haystack is needles too: every other key has another value."""

    def __init__(self, kind: str, next_key: NewText, next_value: NewText, place: float):
        """place: of the needle that is asked for, from 0 (first line) to 1 (last)."""
        self._kind = kind
        self._next_key = next_key
        self._next_value = next_value
        self._place = place
        # value of each key; the first is asked for
        self._values = {next_key(): next_value()}
        self._given = set(self._values.values())

    def build(self, size: int) -> Prompt:
        """With `size` lines beside the one asked for; a smaller haystack is part of a larger."""
        while len(self._values) <= size:
            value = self._next_value()
            if value not in self._given:
                self._given.add(value)
                self._values[self._next_key()] = value
        (key, value), *others = self._values.items()
        lines = [needle(self._kind, *other) for other in others[:size]]
        lines.insert(round(self._place * size), needle(self._kind, key, value))
        return make_prompt(self._kind, key, value, "\n".join(lines))
