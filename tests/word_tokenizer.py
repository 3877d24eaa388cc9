"""A tokenizer for tests: words, digits and marks are a token each, as is a run of spaces."""

from __future__ import annotations

import re

from sglang_multipole.evaluation.task import Prompt


class WordTokenizer:
    """Counts like a tokenizer that splits digits; its ids only tell lengths."""

    def encode(self, prompt: Prompt) -> list[int]:
        pieces = re.findall(r"[A-Za-z]+|\d|[^\w\s]|\s+|_", prompt.text + prompt.answer_prefix)
        return [len(piece) for piece in pieces]
