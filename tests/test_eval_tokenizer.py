"""The tokenizer counts what a server counts: the prompt, and what stands around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang_multipole.evaluation.task import Prompt
from sglang_multipole.evaluation.tokenizer import ModelTokenizer

PROMPT = Prompt("one two", None, " three")
TEMPLATE = (
    "{% if brief %}brief {% endif %}"
    "{% for message in messages %}user {{ message.content }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
WORDS = ("unknown", "one", "two", "three", "user", "end", "assistant", "brief")


def save_tokenizer(folder: Path, template: str | None) -> str:
    """A checkpoint's tokenizer with a word a token."""
    words = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=WORDS[0])
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def decode(ids: list[int]) -> str:
    return " ".join(WORDS[number] for number in ids)


def test_a_chat_has_its_template_around_the_prompt_and_no_prefix(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path, TEMPLATE)
    tokenizer = ModelTokenizer(path, chat=True)
    assert decode(tokenizer.encode(PROMPT)) == "user one two end assistant"
    brief = ModelTokenizer(path, chat=True, template_kwargs={"brief": True})
    assert decode(brief.encode(PROMPT)) == "brief user one two end assistant"


def test_a_completion_is_the_text_with_the_prefix(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(save_tokenizer(tmp_path, None), chat=False)
    assert decode(tokenizer.encode(PROMPT)) == "one two three"


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer must be a model's folder"):
        ModelTokenizer("/absent/folder", chat=False)
    with pytest.raises(ValueError, match="give --api completions"):
        ModelTokenizer(save_tokenizer(tmp_path, None), chat=True)
