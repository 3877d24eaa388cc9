"""How many tokens are clustered together, by the model's RoPE base."""

from __future__ import annotations

import math

_SHORT, _LONG = 2048, 4096  # tokens


def segment_size_for(rope_base: float) -> int:
    """Tokens of a segment.

    A longer segment sorts content more finely, until the mean of keys that RoPE has turned by
    their positions blurs. Pair f of F turns by position * base^(-f / F): half of the pairs turn
    less than once within 2 pi sqrt(base) tokens, and a segment may be as long. Measured with bases
    of 1e5 and 1e6, see docs/fidelity.md.

    Args:
        rope_base: rope_theta in the model's configuration.
    """
    if 2 * math.pi * math.sqrt(rope_base) >= _LONG:
        return _LONG
    return _SHORT
