"""RULER's variable tracking: follow one chain of assignments through repeated filler."""

from __future__ import annotations

import random
import string

from sglang_multipole.evaluation import noise
from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng

ANSWER_TOKENS = 30  # RULER's
NUM_HOPS = 4
NAME_LETTERS = 5
VALUE_DIGITS = 5
# an answered example stands before the question; its names are shorter, so that none is an answer
EXAMPLE_TOKENS = 500
EXAMPLE_NAME_LETTERS = 3


class VariableTracking(HaystackTask):
    """Name all variables that have one value, through assignments of each other."""

    name = "vt"
    max_tokens = ANSWER_TOKENS

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        example = _Chain(rng, EXAMPLE_NAME_LETTERS)
        shown = fit(example.build, EXAMPLE_TOKENS, tokenizer, f"{self.name}'s example")
        solved = f"{shown.text}{shown.answer_prefix} {' '.join(example.names)}\n\n"
        chain = _Chain(rng, NAME_LETTERS)

        def build(size: int) -> Prompt:
            prompt = chain.build(size)
            return Prompt(solved + prompt.text, prompt.reference, prompt.answer_prefix)

        return fit(build, room, tokenizer, self.name)


class _Chain:
    """One value, handed on from variable to variable."""

    def __init__(self, rng: random.Random, num_letters: int):
        self.names: list[str] = []
        while len(self.names) <= NUM_HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
            if name not in self.names:
                self.names.append(name)
        self.value = rng.randrange(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS)
        self._places = sorted(rng.random() for _ in self.names)

    def build(self, size: int) -> Prompt:
        lines = [f"VAR {self.names[0]} = {self.value}"]
        lines += [
            f"VAR {later} = VAR {earlier} "
            for earlier, later in zip(self.names, self.names[1:], strict=False)
        ]
        context = noise.with_inserted(lines, self._places, size)
        text = (
            "Memorize and track the chain of variable assignments hidden in the following text."
            f"\n\n{context}\n\n"
            "Question: Find all variables that are assigned the value "
            f"{self.value} in the text above, directly or through other variables."
        )
        prefix = (
            f" Answer: The {len(self.names)} variables that are assigned the value "
            f"{self.value} are:"
        )
        return Prompt(text, self.names, prefix)
