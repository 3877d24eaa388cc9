"""RULER's niah_multikey_2: one needle among needles, each a number for a word."""

from __future__ import annotations

from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng
from sglang_multipole.evaluation.tasks import needles


class NiahMultikey2(HaystackTask):
    """Find the needle of one key among those of all others."""

    name = "niah_multikey_2"
    max_tokens = needles.ANSWER_TOKENS

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        place = rng.random()
        haystack = needles.NeedleHaystack(
            "number", needles.word_keys(rng), lambda: needles.new_number(rng), place
        )
        return fit(haystack.build, room, tokenizer, self.name)
