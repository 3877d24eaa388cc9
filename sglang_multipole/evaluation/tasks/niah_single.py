"""RULER's niah_single_1: one needle, a number for a word, in repeated filler."""

from __future__ import annotations

from typing import Any

from sglang_multipole.evaluation import noise
from sglang_multipole.evaluation.task import (
    Prompt,
    Tokenizer,
    fit,
    fraction_found,
    make_rng,
    require_length,
)
from sglang_multipole.evaluation.tasks import needles


class NiahSingle:
    """Find the only needle."""

    name = "niah_single"
    max_tokens = needles.ANSWER_TOKENS

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """See Task."""
        room = require_length(length, self.max_tokens, self.name)
        return [self._sample(f"{seed}/{i}", room, tokenizer) for i in range(samples)]

    def score(self, answer: str, reference: Any) -> float:
        """See Task."""
        return fraction_found(answer, reference)

    def _sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        key, value = needles.word_keys(rng)(), needles.new_number(rng)
        place = rng.random()

        def build(size: int) -> Prompt:
            lines = [needles.needle("number", key, value)]
            context = noise.with_inserted(lines, [place], size)
            return needles.make_prompt("number", key, value, context)

        return fit(build, room, tokenizer, self.name)
