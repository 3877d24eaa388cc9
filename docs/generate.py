"""Write the generated tables of arguments.md and support.md anew.

    python docs/generate.py

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is
written by hand. tests/test_docs.py fails when a table is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multipole_patches import add_cli_args
from sglang_multipole import refusals
from sglang_multipole.config import MultipoleConfig

FOLDER = Path(__file__).parent
FILES = ("arguments.md", "support.md")
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """The text of a file with its generated parts made anew.

    Raises:
        KeyError: a part has a name that is none.
    """
    return _PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n\n{part[3]}", text)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown; what is in a cell may hold a vertical bar."""
    lines = [head, ("---",) * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def flags() -> str:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    add_cli_args.add_arguments(parser)
    rows = [
        (f"`{action.option_strings[0]}`", _default(action.default), action.help or "")
        for action in parser._actions
    ]
    return table(("Argument", "Default", "Description"), rows)


def config() -> str:
    """The keys of the configuration."""
    rows = [
        (
            f"`{field.name}`",
            _default(field.default),
            _values(field),
            field.metadata["help"],
        )
        for field in dataclasses.fields(MultipoleConfig)
    ]
    return table(("Key", "Default", "Values", "Description"), rows)


def refused_arguments() -> str:
    """What the server's arguments and the environment may not ask for."""
    rows = [(rule.feature, rule.recipe) for rule in refusals.ARGUMENTS]
    return table(("Refused", "What works instead"), rows)


def refused_models() -> str:
    """What the model may not have."""
    rows = [(rule.feature, rule.recipe) for rule in refusals.MODELS]
    return table(("Refused", "What works instead"), rows)


def layers() -> str:
    """What the model's layers and SGLang's pools must be."""
    rows = [
        ("rotary embeddings", ", ".join(refusals.SUPPORTED_ROTARY), ""),
        ("dtype", "bfloat16, float16", "also float32 without a GPU"),
        ("head_dim", ", ".join(map(str, refusals.SUPPORTED_HEAD_DIMS)), "any without a GPU"),
        ("query heads a KV head", f"1 to {refusals.MAX_GQA_GROUP_SIZE}", "any without a GPU"),
        ("KV pool", refusals.SUPPORTED_KV_POOL, ""),
        ("KV allocator", ", ".join(refusals.SUPPORTED_ALLOCATORS), ""),
    ]
    return table(("", "Supported", "Note"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "flags": flags,
    "config": config,
    "refused_arguments": refused_arguments,
    "refused_models": refused_models,
    "layers": layers,
}


def _default(value: Any) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _values(field: dataclasses.Field) -> str:
    """What the key takes: choices, or limits with their unit."""
    metadata = field.metadata
    if metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    if metadata.get("is_text"):
        return "text"
    if isinstance(field.default, bool):
        return "`true`, `false`"
    return f"{metadata['low']} to {metadata['high']} {metadata['unit']}"


def main() -> int:
    for name in FILES:
        path = FOLDER / name
        path.write_text(render(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
