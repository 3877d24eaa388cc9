"""Texts of four kinds, made from what every Python installation holds, as token ids.

    python -m benchmarks.fidelity.texts MODEL OUT.json --tokens 8192 --generations GEN.json

Choices are made on the `dev` texts and reported on the `test` texts; no file is in both. The last
--decoded tokens of a look-up text recite its list in another order.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import random
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

Tokenize = Callable[[str], list[int]]

CODE_MODULES = {
    "dev": ["argparse"],
    "test": ["tarfile", "inspect", "mailbox"],
}
FIRST_NAMES = "Ada Ben Cora Dan Eve Finn Gus Hana Ivo Jane Karl Lena Max Nora Otto Pia Quinn Rosa"
LAST_NAMES = "Adler Brook Cole Drake Ellis Frost Grant Hale Irving Jones Kerr Lowe Moss Nash Owen"
CITIES = "Paris Tokyo Lima Oslo Cairo Delhi Rome Quito Accra Berlin Dublin Havana Lagos Madrid"
TRADES = "baker pilot nurse farmer lawyer painter miner tailor dentist sailor judge weaver cook"


def language_reference(split: str) -> str:
    """Prose: the topics of Python's language reference, every second one for each split."""
    topics = importlib.import_module("pydoc_data.topics").topics
    names = sorted(topics)[0 if split == "dev" else 1 :: 2]
    return "\n\n".join(topics[name] for name in names)


def licences() -> str:
    """Prose: licence texts of installed packages, each distinct text once."""
    texts = set()
    for package in ("torch", "numpy", "matplotlib", "pillow", "scipy"):
        for file in metadata.files(package) or []:
            if "LICENSE" in file.name.upper() and file.suffix != ".py":
                texts.add(file.read_text())
    return "\n\n".join(sorted(texts, key=len, reverse=True)[:3])


def optics() -> str:
    """Prose: Newton's Opticks, a test file of a library that apache-tvm-ffi ships."""
    for file in metadata.files("apache-tvm-ffi") or []:
        if file.name == "Isaac.Newton-Opticks.txt":
            return Path(str(file.locate())).read_text(errors="replace")[20_000:]
    raise FileNotFoundError("texts: apache-tvm-ffi with Isaac.Newton-Opticks.txt is not installed")


def source_code(module: str) -> str:
    """Code: a module of the standard library."""
    return inspect.getsource(importlib.import_module(module))


def numbered_lines(rng: random.Random) -> Callable[[], str]:
    """Look-up: a random key and a random number."""
    return lambda: f"key {rng.randrange(16**5):05x}: {rng.randrange(10**6):06d}\n"


def people_lines(rng: random.Random) -> Callable[[], str]:
    """Look-up: a person, known by a full name, a trade, an age and a city."""

    def line() -> str:
        pick = lambda words: rng.choice(words.split())  # noqa: E731
        name = f"{pick(FIRST_NAMES)} {pick(LAST_NAMES)}{pick(LAST_NAMES).lower()}"
        return f"{name} is a {pick(TRADES)} of {rng.randrange(20, 90)} from {pick(CITIES)}.\n"

    return line


def dictionary_lines(rng: random.Random) -> Callable[[], str]:
    """Look-up: an invented word and its translation into another."""

    def word() -> str:
        syllables = rng.randrange(2, 4)
        return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))

    return lambda: f"{word()} means {word()} {word()}\n"


def look_up_tokens(
    line: Callable[[], str], rng: random.Random, tokenize: Tokenize, tokens: int, decoded: int
) -> list[int]:
    """A list of lines, then the same lines in another order from about `decoded` tokens ahead."""
    listed, ids = [], tokenize("Here is a list to remember.\n")
    turn = tokenize("\nThe same list again, in another order:\n")
    while len(ids) + len(turn) < tokens - decoded:
        listed.append(line())
        ids = ids + tokenize(listed[-1])
    recited = rng.sample(listed, len(listed))
    ids = ids + turn
    for entry in recited:
        ids = ids + tokenize(entry)
    return ids[:tokens]


def all_texts(tokenize: Tokenize, tokens: int, decoded: int, seed: int = 0) -> list[dict]:
    """Rows of split, kind, name and token_ids; a text too short for `tokens` is an error."""
    rows: list[dict] = []

    def add(split: str, kind: str, name: str, ids: list[int]) -> None:
        if len(ids) < tokens:
            raise ValueError(f"texts: {name} has {len(ids)} tokens, {tokens} are needed")
        label = {"seed": seed, "split": split, "kind": kind, "name": name}
        rows.append(label | {"token_ids": ids[:tokens]})

    def cut(text: str) -> list[int]:
        return tokenize(text[: 10 * tokens])

    add("dev", "prose", "reference-dev", cut(language_reference("dev")))
    add("test", "prose", "reference", cut(language_reference("test")))
    for name, source in (("licences", licences), ("opticks", optics)):
        try:
            add("test", "prose", name, cut(source()))
        except (FileNotFoundError, metadata.PackageNotFoundError, ValueError) as error:
            print(f"left out: {error}")
    for split, modules in CODE_MODULES.items():
        for module in modules:
            add(split, "code", module, cut(source_code(module)))
    look_up = {
        ("dev", "numbers-dev"): numbered_lines,
        ("dev", "people-dev"): people_lines,
        ("test", "numbers"): numbered_lines,
        ("test", "people"): people_lines,
        ("test", "dictionary"): dictionary_lines,
    }
    for i, ((split, name), lines) in enumerate(look_up.items()):
        rng = random.Random(1000 * seed + i)
        ids = look_up_tokens(lines(rng), rng, tokenize, tokens, decoded)
        add(split, "look-up", name, ids)
    return rows


def main() -> None:
    from transformers import AutoTokenizer

    from benchmarks.fidelity.checkpoint import tokenizer_arguments

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--decoded", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=Path)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(**tokenizer_arguments(args.model))
    rows = all_texts(lambda t: tokenizer(t).input_ids, args.tokens, args.decoded, args.seed)
    for row in json.loads(args.generations.read_text()) if args.generations else []:
        split = row["name"].split("-")[0]
        ids = row["token_ids"][: args.tokens]
        label = {"seed": args.seed, "split": split, "kind": "generation", "name": row["name"]}
        rows.append(label | {"token_ids": ids})
    args.out.write_text(json.dumps(rows))
    for row in rows:
        print(f"{row['split']:5} {row['kind']:10} {row['name']:15} {len(row['token_ids'])} tokens")


if __name__ == "__main__":
    main()
