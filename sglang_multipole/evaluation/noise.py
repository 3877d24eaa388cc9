"""The repeated filler of RULER's noise haystack; its size is in lines."""

from __future__ import annotations

from collections.abc import Sequence

LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def with_inserted(lines: Sequence[str], places: Sequence[float], size: int) -> str:
    """`size` lines of filler with `lines` among them, in their order.

    Args:
        lines: to be inserted.
        places: of each line, from 0 (before all filler) to 1 (behind it), ascending; fractions, so
            that a larger haystack keeps them.
        size: lines of filler.
    """
    text: list[str] = []
    filled = 0
    for line, place in zip(lines, places, strict=True):
        text += [LINE] * (round(place * size) - filled)
        text.append(line)
        filled = round(place * size)
    text += [LINE] * (size - filled)
    return "\n".join(text)
