"""Reads a JSONL file of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are passed over.

    Raises:
        ValueError: the file cannot be read, a line is no JSON object or lacks a field.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task file: --path must be a readable JSONL file, got {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"task file: each line must be a JSON object, got {error} in line "
                f"{number} of {path}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"task file: each line must be a JSON object, got {row!r:.60} in line {number} "
                f"of {path}"
            )
        missing = [field for field in fields if field not in row]
        if missing:
            raise ValueError(
                f"task file: each line must have {', '.join(fields)}, got none of "
                f"{', '.join(missing)} in line {number} of {path}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"task file: the file must have at least one line, got none in {path}")
    return rows
