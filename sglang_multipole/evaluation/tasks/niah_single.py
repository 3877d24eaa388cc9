"""RULER's niah_single_1: one needle, a number for a word, in repeated filler."""

from __future__ import annotations

from sglang_multipole.evaluation import noise
from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng
from sglang_multipole.evaluation.tasks import needles


class NiahSingle(HaystackTask):
    """Find the only needle."""

    name = "niah_single"
    max_tokens = needles.ANSWER_TOKENS

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        key, value = needles.word_keys(rng)(), needles.new_number(rng)
        place = rng.random()

        def build(size: int) -> Prompt:
            lines = [needles.needle("number", key, value)]
            context = noise.with_inserted(lines, [place], size)
            return needles.make_prompt("number", key, value, context)

        return fit(build, room, tokenizer, self.name)
