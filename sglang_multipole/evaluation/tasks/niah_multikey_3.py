"""RULER's niah_multikey_3: one needle among needles, each a UUID for a UUID."""

from __future__ import annotations

from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng
from sglang_multipole.evaluation.tasks import needles


class NiahMultikey3(HaystackTask):
    """Find the needle of one key; keys and values mean nothing."""

    name = "niah_multikey_3"
    max_tokens = needles.ANSWER_TOKENS

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        place = rng.random()
        haystack = needles.NeedleHaystack(
            "uuid", lambda: needles.new_uuid(rng), lambda: needles.new_uuid(rng), place
        )
        return fit(haystack.build, room, tokenizer, self.name)
