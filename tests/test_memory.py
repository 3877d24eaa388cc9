"""The bytes that SGLang's budget is told are the bytes that are allocated."""

from __future__ import annotations

import torch

from sglang_multipole import memory
from sglang_multipole.cluster_pool import ClusterPool, PoolShape, place_bytes
from sglang_multipole.config import MultipoleConfig

CONFIG = MultipoleConfig()


def test_a_place_costs_what_is_charged_for_it():
    def pool(num_places: int) -> ClusterPool:
        shape = PoolShape(3, 2, 64, 100, 10, torch.bfloat16, "cpu")
        return ClusterPool(CONFIG, shape, num_places)

    assert pool(9).nbytes - pool(4).nbytes == 5 * place_bytes(CONFIG, 3, 2, 64, 2)


def test_the_pool_stays_within_its_share_of_the_kv_pool():
    """Qwen3-8B's geometry, 374K tokens: at most 7.5 % at one centroid in 16 tokens."""
    num_tokens, layers, heads, dim = 374_000, 36, 8, 128
    places = memory.num_places(CONFIG, num_tokens)
    kv_bytes = num_tokens * layers * heads * 2 * dim * 2
    assert places * place_bytes(CONFIG, layers, heads, dim, 2) / kv_bytes < 0.075


def test_headroom_is_chosen_or_given():
    assert memory.num_places(CONFIG, 1024 * 160) == 160 + 10 + 8 + 1
    given = MultipoleConfig(pool_headroom=50)
    assert memory.num_places(given, 1024 * 160 + 1) == 161 + 50 + 1
