"""RULER's niah_multikey_3: one needle among needles, each a UUID for a UUID."""

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


class NiahMultikey3:
    """Find the needle of one key; keys and values mean nothing."""

    name = "niah_multikey_3"
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
            "uuid", lambda: needles.new_uuid(rng), lambda: needles.new_uuid(rng), place
        )
        return fit(haystack.build, room, tokenizer, self.name)
