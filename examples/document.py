"""A long text that every Python brings along, for examples that need one."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

CHAPTERS = ("try", "with", "raise", "exceptions")  # about 4,200 tokens


def read(path: Path | None) -> str:
    """The file's text; without one, chapters of the Python reference."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n\n".join(topics[chapter].strip() for chapter in CHAPTERS)
