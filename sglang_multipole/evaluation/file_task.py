"""What tasks of a local JSONL file share: its first rows become the prompts."""

from __future__ import annotations

import abc
from typing import Any

from sglang_multipole.evaluation.task import Prompt, Tokenizer
from sglang_multipole.evaluation.tasks.rows import read_rows


class FileTask(abc.ABC):
    """A Task over the rows of a file.

    Attributes:
        fields: what every row must have.
    """

    name: str
    max_tokens: int
    fields: tuple[str, ...]

    def __init__(self, path: str):
        self._path = path

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """The file's first rows; the seed changes nothing.

        Raises:
            ValueError: a row cannot be used; the message names it.
        """
        rows = read_rows(self._path, self.fields)[:samples]
        for number, row in enumerate(rows, start=1):
            self.check_row(row, f"row {number} of {self._path}")
        return [self.make_prompt(row, length, tokenizer) for row in rows]

    @abc.abstractmethod
    def check_row(self, row: dict[str, Any], where: str) -> None:
        """Raise ValueError, with the place `where`, if the row has no usable answer."""

    @abc.abstractmethod
    def make_prompt(self, row: dict[str, Any], length: int | None, tokenizer: Tokenizer) -> Prompt:
        """The prompt of a checked row, of at most `length` tokens where the task can be cut."""
