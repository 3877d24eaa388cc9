"""What RULER's tasks share: samples that fill a length, and strings that must be in the answer."""

from __future__ import annotations

import abc
from typing import Any

from sglang_multipole.evaluation.task import (
    Prompt,
    Tokenizer,
    fraction_found,
    require_length,
)


class HaystackTask(abc.ABC):
    """A Task whose prompts fill the length that is left beside the answer."""

    name: str
    max_tokens: int

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """See Task."""
        room = require_length(length, self.max_tokens, self.name)
        return [self.make_sample(f"{seed}/{i}", room, tokenizer) for i in range(samples)]

    def score(self, answer: str, reference: Any) -> float:
        """See Task."""
        return fraction_found(answer, reference)

    @abc.abstractmethod
    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        """One prompt of at most `room` tokens; all random draws follow from the seed."""
