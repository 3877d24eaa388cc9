"""Passkey: a five-digit key somewhere in repeated filler."""

from __future__ import annotations

import re
from typing import Any

from sglang_multipole.evaluation import noise
from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng, strip_reasoning

ANSWER_TOKENS = 32
KEY_DIGITS = 5


class Passkey(HaystackTask):
    """Repeat the key."""

    name = "passkey"
    max_tokens = ANSWER_TOKENS

    def score(self, answer: str, reference: Any) -> float:
        """1 if the key is a number of the answer; digits within a longer number do not count."""
        return float(reference in re.findall(r"\d+", strip_reasoning(answer)))

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        key = str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))
        place = rng.random()

        def build(size: int) -> Prompt:
            line = f"The pass key is {key}. Remember it. {key} is the pass key."
            text = (
                "There is a pass key hidden in a lot of irrelevant text. Find it and memorize it. "
                f"You will be asked for it.\n{noise.with_inserted([line], [place], size)}\n"
                "What is the pass key?"
            )
            return Prompt(text, key, " The pass key is")

        return fit(build, room, tokenizer, self.name)
