"""A source of keys from benchmarks.capture_keys, for a geometry of twice the model's head_dim.

A captured vector is laid out twice, such that rotary pairs stay pairs, and queries are scaled such
that logits are the captured ones. A context longer than the text repeats it, turned by RoPE to its
earlier place: the last repetition is the captured one.
"""

from __future__ import annotations

import math

import torch

from tests.decode_keys import Source


def captured_source(path: str, num_kv_heads: int, gqa_group_size: int, device: str) -> Source:
    """Rows take their queries from different positions of the text's end."""
    kept = {name: tensor.to(device).float() for name, tensor in torch.load(path).items()}
    # [T, H, D]
    keys, values = (kept[name][:num_kv_heads].transpose(0, 1) for name in ("keys", "values"))
    # [N, H * G, D]: every position of every head of the model's own group is a query head
    queries = kept["queries"][:num_kv_heads].flatten(1, 2)
    text_len = len(keys)

    def make(num_tokens: int, generator: torch.Generator):
        repetitions = -(-num_tokens // text_len)
        turned = [
            _turn(keys, -text_len * nth, kept["inverse_frequency"])
            for nth in reversed(range(repetitions))
        ]
        chosen = torch.randint(
            0, queries.shape[1], (gqa_group_size,), generator=generator, device=device
        )
        # logits are summed over both copies and scaled for twice the dimensions
        query = queries[:, chosen].flatten(0, 1) * math.sqrt(0.5)
        return (
            _twice(torch.cat(turned)[-num_tokens:]),
            _twice(values.repeat(repetitions, 1, 1)[-num_tokens:]),
            _twice(query),
        )

    return make


def _turn(keys: torch.Tensor, positions: int, inverse_frequency: torch.Tensor) -> torch.Tensor:
    """Keys [T, H, D] moved by so many positions."""
    angle = positions * inverse_frequency
    first, second = keys.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _twice(vectors: torch.Tensor) -> torch.Tensor:
    """[*, 2 D] of [*, D], such that dimensions f and f + D are a pair as f and f + D / 2 were."""
    first, second = vectors.chunk(2, -1)
    return torch.cat([first, first, second, second], -1)
