"""A source of keys from benchmarks.capture_keys, for a geometry of twice the model's head_dim.

A captured vector is laid out twice, such that rotary pairs stay pairs, and queries are scaled such
that logits are the captured ones. A context longer than the text repeats it, turned by RoPE to its
earlier place: the last repetition is the captured one.
"""

from __future__ import annotations

import math

import torch

from multipole_kernels import reference


class CapturedKeys:
    """Keys as captured, clustered without their RoPE as a server does it.

    Rows take their queries from different positions of the text's end.
    """

    def __init__(self, path: str, num_kv_heads: int, gqa_group_size: int, device: str):
        kept = {name: tensor.to(device).float() for name, tensor in torch.load(path).items()}
        # [T, H, D]
        self._keys, self._values = (
            kept[name][:num_kv_heads].transpose(0, 1) for name in ("keys", "values")
        )
        # [H, N, D]: all positions of all query heads of a KV head
        self._queries = kept["queries"][:num_kv_heads].flatten(1, 2)
        self._group_size = gqa_group_size
        self._inverse_frequency = kept["inverse_frequency"]

    def make(
        self, num_tokens: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [T, H, 2 D], values [T, H, 2 D] and one query [H * G, 2 D]."""
        text_len, device = len(self._keys), self._keys.device
        repetitions = -(-num_tokens // text_len)
        turned = [self._turned(-text_len * nth) for nth in reversed(range(repetitions))]
        chosen = torch.randint(
            0, self._queries.shape[1], (self._group_size,), generator=generator, device=device
        )
        # logits are summed over both copies and scaled for twice the dimensions
        query = self._queries[:, chosen].flatten(0, 1) * math.sqrt(0.5)
        return (
            _twice(torch.cat(turned)[-num_tokens:]),
            _twice(self._values.repeat(repetitions, 1, 1)[-num_tokens:]),
            _twice(query),
        )

    def features(self, keys: torch.Tensor, begin: int, num_tokens: int) -> torch.Tensor:
        """Keys [*, T, 2 D] at positions begin and on of a row, turned back to position 0."""
        first = begin - num_tokens + len(self._keys)
        positions = first + torch.arange(keys.shape[-2], device=keys.device)
        angle = positions[:, None] * self._inverse_frequency.repeat(2)
        return reference.unrotate(keys, angle.cos(), angle.sin())

    def _turned(self, positions: int) -> torch.Tensor:
        """The captured keys moved by so many positions."""
        angle = positions * self._inverse_frequency
        first, second = self._keys.chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _twice(vectors: torch.Tensor) -> torch.Tensor:
    """[*, 2 D] of [*, D], such that dimensions f and f + D are a pair as f and f + D / 2 were."""
    first, second = vectors.chunk(2, -1)
    return torch.cat([first, first, second, second], -1)
