"""RULER's niah_multikey_2: one needle among needles, each a number for a word."""

from __future__ import annotations

from typing import Any

from sglang_multipole.evaluation.task import (
    Prompt,
    Tokenizer,
    fit,
    fraction_found,
    make_rng,
    require_length,
)
from sglang_multipole.evaluation.tasks import needles


class NiahMultikey2:
    """Find the needle of one key among those of all others."""

    name = "niah_multikey_2"
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
        place = rng.random()
        haystack = needles.NeedleHaystack(
            "number", needles.word_keys(rng), lambda: needles.new_number(rng), place
        )
        return fit(haystack.build, room, tokenizer, self.name)
