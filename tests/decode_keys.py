"""Keys and queries made for tests and benchmarks: a mixture with position structure.

Runs of tokens share a topic, topics come back, and a head sees each topic around its own centre
with a drift along the sequence; queries look for a few topics and for the first token.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

NUM_TOPICS = 96
MEAN_RUN = 12  # tokens before the topic changes


class Source(Protocol):
    """Where a row's keys come from."""

    def make(
        self, num_tokens: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys [T, H, D], values [T, H, D] and one query [H * G, D], float32."""

    def features(self, keys: torch.Tensor, begin: int, num_tokens: int) -> torch.Tensor:
        """What is clustered of keys [*, T, D] at positions begin and on of a row of num_tokens."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Mixtures without RoPE; values are normal."""

    num_kv_heads: int
    gqa_group_size: int
    head_dim: int

    def make(
        self, num_tokens: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys, centres = make_keys(num_tokens, self.num_kv_heads, self.head_dim, generator)
        values = torch.randn(keys.shape, generator=generator, device=keys.device)
        return keys, values, make_queries(keys, centres, self.gqa_group_size, generator)

    def features(self, keys: torch.Tensor, begin: int, num_tokens: int) -> torch.Tensor:
        return keys


def make_keys(
    num_tokens: int, num_kv_heads: int, head_dim: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [num_tokens, H, D] and the topics' centres [NUM_TOPICS, H, D], float32."""
    device = generator.device
    new_run = torch.rand(num_tokens, generator=generator, device=device) < 1.0 / MEAN_RUN
    run = new_run.long().cumsum(0)
    # squared: some topics are frequent, most are rare
    topic_of_run = torch.rand(num_tokens + 1, generator=generator, device=device).square()
    topic = (topic_of_run[run] * NUM_TOPICS).long()
    shape = (NUM_TOPICS, num_kv_heads, head_dim)
    centres = torch.randn(shape, generator=generator, device=device)
    keys = centres[topic]
    keys += 0.6 * torch.randn(keys.shape, generator=generator, device=device)
    drift = torch.randn(2, 1, num_kv_heads, head_dim, generator=generator, device=device)
    phase = torch.arange(num_tokens, device=device)[:, None, None] / 4096.0
    keys += 0.3 * (drift[0] * phase.sin() + drift[1] * phase.cos())
    return keys, centres


def make_queries(
    keys: torch.Tensor, centres: torch.Tensor, gqa_group_size: int, generator: torch.Generator
) -> torch.Tensor:
    """One query [H * G, D] that looks for a few topics and the first token."""
    num_kv_heads, head_dim = keys.shape[1:]
    shape = (num_kv_heads, gqa_group_size, head_dim)
    wanted = torch.randint(
        0, NUM_TOPICS, (3, num_kv_heads, gqa_group_size), generator=generator, device=keys.device
    )
    heads = torch.arange(num_kv_heads, device=keys.device)[:, None]
    q = 0.5 * torch.randn(shape, generator=generator, device=keys.device)
    for nth, strength in enumerate((0.9, 0.6, 0.4)):
        q += strength * centres[wanted[nth], heads]
    q += 0.3 * keys[0][:, None, :]
    return q.reshape(num_kv_heads * gqa_group_size, head_dim)
