"""RULER's frequent words extraction: the three most frequent of many made-up words."""

from __future__ import annotations

import random
import string

from sglang_multipole.evaluation.haystack_task import HaystackTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, fit, make_rng

ANSWER_TOKENS = 50  # RULER's
TOKENS_PER_WORD_KIND = 50  # the vocabulary has length // this words
MIN_VOCABULARY = 8
WORD_LETTERS = 6
ZETA = 2.0  # exponent of the frequencies
NUM_ASKED = 3
DOTS = "..."  # stands for the most frequent word, and is not asked for


class FrequentWords(HaystackTask):
    """Count words over the whole context."""

    name = "fwe"
    max_tokens = ANSWER_TOKENS

    def make_sample(self, seed: str, room: int, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        vocabulary = _make_vocabulary(rng, max(MIN_VOCABULARY, room // TOKENS_PER_WORD_KIND))

        def build(size: int) -> Prompt:
            return _build(vocabulary, size, make_rng(self.name, seed, "order"))

        return fit(build, room, tokenizer, self.name)


def count_words(num_words: int, size: int) -> list[int]:
    """How often each of num_words words stands in a text of about `size` words, most first.

    The three that are asked for differ from each other and from the rest, however short the text.
    """
    weights = [rank**-ZETA for rank in range(1, num_words + 1)]
    total = sum(weights)
    counts = [int(size * weight / total) for weight in weights]
    # from the rarest asked for upwards; the rest of the words stands at least once
    counts[NUM_ASKED + 1 :] = [max(1, count) for count in counts[NUM_ASKED + 1 :]]
    for rank in range(NUM_ASKED, -1, -1):
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    return counts


def _make_vocabulary(rng: random.Random, num_words: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < num_words:
        words["".join(rng.choices(string.ascii_lowercase, k=WORD_LETTERS))] = None
    return list(words)


def _build(vocabulary: list[str], size: int, rng: random.Random) -> Prompt:
    counts = count_words(len(vocabulary), size)
    words = [DOTS] * counts[0]
    for word, count in zip(vocabulary[1:], counts[1:], strict=True):
        words += [word] * count
    rng.shuffle(words)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appearing coded words.\n{' '.join(words)}\n"
        "Question: What are the three most frequently appearing words in the coded text above? "
        f"Ignore the dots '{DOTS}' and do not explain."
    )
    prefix = " Answer: The three most frequently appearing words in the coded text above are:"
    return Prompt(text, vocabulary[1 : NUM_ASKED + 1], prefix)
