"""GSM-Infinite, symbolic: which variables have a value, given relations in any order.

Written from the rules (arXiv 2502.05252), not from their code. The first `ops` variables are a
random tree: the root has a value, each other variable equals its parent, or is one more or less.
All other variables are a second such tree without a value at its root: filler from which nothing
can be derived.
"""

from __future__ import annotations

import random
import re
from typing import Any

from sglang_multipole.evaluation.task import (
    Prompt,
    Tokenizer,
    fit,
    last_boxed,
    make_rng,
    strip_reasoning,
)

ANSWER_TOKENS = 2048  # step by step; reasoning models need more
NAME_DIGITS = 6
MAX_ROOT_VALUE = 10
NAME = re.compile(r"\bV\d+\b")
BULLET = re.compile(r"\s*([-*•]|\d+[.)])\s")

QUESTION = (
    "The context contains relationships between variables. These relationships are independent "
    "mathematical equations that are all satisfied simultaneously.\n"
    "Using only these relationships, determine which variables (if any) from which values can be "
    "derived are equal to {value}.\n"
    "Show your step-by-step reasoning and calculations, and then conclude your final answer in a "
    "sentence."
)


class GsmSymbolic:
    """Derive `ops` variables and name those with one value."""

    max_tokens = ANSWER_TOKENS

    def __init__(self, ops: int):
        if ops < 1:
            raise ValueError(f"gsm_symbolic: ops must be at least 1, got {ops}; give --ops 1-8")
        self.ops = ops
        self.name = f"gsm_symbolic_op{ops}"

    def generate(
        self, samples: int, length: int | None, seed: int, tokenizer: Tokenizer
    ) -> list[Prompt]:
        """See Task; the length is of the prompt alone, None is no filler."""
        return [self._sample(f"{seed}/{i}", length, tokenizer) for i in range(samples)]

    def score(self, answer: str, reference: Any) -> float:
        """1 if the concluding sentence names exactly the right variables."""
        return float(concluded_names(answer) == set(reference))

    def _sample(self, seed: str, length: int | None, tokenizer: Tokenizer) -> Prompt:
        rng = make_rng(self.name, seed)
        names = _Names(rng)
        solvable = _Tree(rng, names)
        solvable.grow(self.ops)
        asked = solvable.values[rng.choice(solvable.names)]
        reference = [name for name in solvable.names if solvable.values[name] == asked]
        filler = _Tree(rng, names)

        def build(size: int) -> Prompt:
            filler.grow(size)
            root, value = solvable.names[0], solvable.values[solvable.names[0]]
            lines = [f"assign {root} = {value}"]
            # the filler's root has no line, so that size names are size - 1 lines
            lines += solvable.lines[: self.ops - 1] + filler.lines[: max(0, size - 1)]
            make_rng(self.name, seed, "order").shuffle(lines)
            context = " ".join(f"{line}." for line in lines)
            question = QUESTION.format(value=asked)
            return Prompt(f"<context>\n{context}\n</context>\n\n{question}", reference)

        return build(0) if length is None else fit(build, length, tokenizer, self.name)


def concluded_names(answer: str) -> set[str]:
    r"""The variables named by an answer's conclusion.

    That is its last \boxed{}, else its last list, else its last sentence, among those that name
    any; what stands before </think> is no answer.
    """
    text = strip_reasoning(answer)
    # V_{000123} and \text{V000123} in formulas, **V000123** in Markdown
    plain = re.sub(r"\\(text|mathrm|mathbf)\s*|[_{}$*`]", "", text)
    boxed = NAME.findall(re.sub(r"[_{}]|\\text", "", last_boxed(text) or ""))
    if boxed:
        return set(boxed)
    # bullets were removed with the Markdown above, if they were stars
    lines = [
        (bool(BULLET.match(raw)), line)
        for raw, line in zip(text.split("\n"), plain.split("\n"), strict=True)
        if line.strip()
    ]
    while lines and not NAME.search(lines[-1][1]):
        lines.pop()
    names: set[str] = set()
    while lines and lines[-1][0]:
        names.update(NAME.findall(lines.pop()[1]))
    if names or not lines:
        return names
    sentences = re.split(r"(?<=[.!?])\s+", lines[-1][1])
    return set(NAME.findall(next(s for s in reversed(sentences) if NAME.search(s))))


class _Names:
    """Variable names without repetition."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._given: set[str] = set()

    def next(self) -> str:
        while True:
            name = f"V{self._rng.randrange(10**NAME_DIGITS):0{NAME_DIGITS}d}"
            if name not in self._given:
                self._given.add(name)
                return name


class _Tree:
    """A random recursive tree: variables, their values from the root's, and each child's line."""

    def __init__(self, rng: random.Random, names: _Names):
        self._rng = rng
        self._names = names
        self.names: list[str] = []
        self.values: dict[str, int] = {}
        self.lines: list[str] = []  # of all but the root

    def grow(self, size: int) -> None:
        """Add variables until there are `size`."""
        while len(self.names) < size:
            name = self._names.next()
            if not self.names:
                self.values[name] = self._rng.randint(0, MAX_ROOT_VALUE)
            else:
                parent = self._rng.choice(self.names)
                step, suffix = self._rng.choice([(0, ""), (1, " + 1"), (-1, " - 1")])
                self.values[name] = self.values[parent] + step
                self.lines.append(f"assign {name} = {parent}{suffix}")
            self.names.append(name)
