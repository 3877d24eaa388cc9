"""LongBench v2 from a local JSONL file: a long document, a question, four choices."""

from __future__ import annotations

import re
from typing import Any

from sglang_multipole.evaluation.file_task import FileTask
from sglang_multipole.evaluation.task import Prompt, Tokenizer, strip_reasoning

ANSWER_TOKENS = 1024
CHOICES = "ABCD"
CUT = "\n[...]\n"  # stands where the middle of a document was cut out


class LongBenchV2(FileTask):
    """Choose one of four answers; documents too long for the length lose their middle."""

    name = "longbench_v2"
    max_tokens = ANSWER_TOKENS
    fields = ("context", "question", *(f"choice_{choice}" for choice in CHOICES), "answer")

    def check_row(self, row: dict[str, Any], where: str) -> None:
        if row["answer"] not in tuple(CHOICES):
            raise ValueError(
                f"longbench_v2: an answer must be one of {', '.join(CHOICES)}, got "
                f"{row['answer']!r} in {where}"
            )

    def make_prompt(self, row: dict[str, Any], length: int | None, tokenizer: Tokenizer) -> Prompt:
        return _fit_document(row, length, tokenizer)

    def score(self, answer: str, reference: Any) -> float:
        """1 if the last choice that is called the answer is the right one."""
        return float(chosen(answer) == reference)


def chosen(answer: str) -> str | None:
    """The letter that an answer gives; None if it gives none."""
    text = strip_reasoning(answer).replace("*", "").strip()
    named = re.findall(r"(?i:answer)\s*(?i:is)?\s*:?\s*\(?([A-D])\b", text)
    if named:
        return named[-1]
    alone = re.findall(r"^\(?([A-D])\)?\.?$|\(([A-D])\)", text, flags=re.MULTILINE)
    return "".join(alone[-1]) if alone else None


def _make_prompt(row: dict[str, Any], context: str, *, shortened: bool) -> Prompt:
    choices = "\n".join(f"({choice}) {row[f'choice_{choice}']}" for choice in CHOICES)
    text = (
        f"Read the text, then answer the question about it.\n\n<text>\n{context}\n</text>\n\n"
        f"Question: {row['question']}\nChoices:\n{choices}\n\n"
        'End your reply with "The answer is (X)", where X is the letter of your choice.'
    )
    return Prompt(text, row["answer"], shortened=shortened)


def _fit_document(row: dict[str, Any], length: int | None, tokenizer: Tokenizer) -> Prompt:
    document = row["context"]
    whole = _make_prompt(row, document, shortened=False)
    if length is None or len(tokenizer.encode(whole)) <= length:
        return whole

    def build(kept: int) -> Prompt:
        half = kept // 2
        cut = document[: kept - half] + CUT + document[len(document) - half :]
        return _make_prompt(row, cut, shortened=True)

    empty = len(tokenizer.encode(build(0)))
    if empty > length:
        raise ValueError(
            f"longbench_v2: the length must be at least {empty} tokens, which a question has "
            f"without its document, got {length}; give a larger --length"
        )
    # halved between what fits and what does not, in characters
    fits, too_large = 0, len(document)
    while too_large - fits > 1:
        kept = (fits + too_large) // 2
        if len(tokenizer.encode(build(kept))) <= length:
            fits = kept
        else:
            too_large = kept
    return build(fits)
