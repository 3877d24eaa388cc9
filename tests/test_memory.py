"""The bytes that SGLang's budget is told are the bytes that are allocated."""

from __future__ import annotations

import pytest
import torch

from sglang_multipole import memory
from sglang_multipole.cluster_pool import ClusterPool, PoolShape, place_bytes
from sglang_multipole.config import MultipoleConfig

CONFIG = MultipoleConfig(segment_size=2048)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "auto"])
def test_a_place_costs_what_is_charged_for_it(dtype):
    config = MultipoleConfig(segment_size=2048, centroid_dtype=dtype)

    def pool(num_places: int) -> ClusterPool:
        shape = PoolShape(3, 2, 64, 100, 10, torch.bfloat16, "cpu")
        return ClusterPool(config, shape, num_places)

    charged = place_bytes(config, 3, 2, 64, torch.bfloat16)
    assert pool(9).nbytes - pool(4).nbytes == 5 * charged


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.04), ("auto", 0.075)])
def test_the_pool_stays_within_its_share_of_the_kv_pool(dtype, share):
    """Qwen3-8B's geometry, 374K tokens, one centroid in 16 tokens."""
    num_tokens, layers, heads, dim = 374_000, 36, 8, 128
    config = MultipoleConfig(segment_size=2048, centroid_dtype=dtype)
    places = memory.num_places(config, num_tokens)
    kv_bytes = num_tokens * layers * heads * 2 * dim * 2
    assert places * place_bytes(config, layers, heads, dim, torch.bfloat16) / kv_bytes < share


def test_headroom_is_chosen_or_given():
    assert memory.num_places(CONFIG, 2048 * 160) == 160 + 10 + 1
    assert memory.num_places(CONFIG, 2048) == 1 + 8 + 1
    given = MultipoleConfig(segment_size=2048, pool_headroom=50)
    assert memory.num_places(given, 2048 * 160 + 1) == 161 + 50 + 1
