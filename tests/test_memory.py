"""The bytes that SGLang's budget is told are the bytes that are allocated."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels.clustering_batch import ClusteringBatch
from multipole_kernels.segment_clustering import SegmentClustering
from sglang_multipole import memory, torch_clustering
from sglang_multipole.cluster_pool import ClusterPool, PoolShape, place_bytes
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.triton_clustering import geometry_of

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


def scratch_held(config: MultipoleConfig, layers: int, heads: int, dim: int, orders: int) -> int:
    """The largest scratch of a chunk of a clustering of so many orders, of any extent."""
    geometry = geometry_of(config, heads, dim, torch.bfloat16, dim // 2)
    table = torch.empty(layers, 4, dtype=torch.int64, device="meta")
    clustering = SegmentClustering(geometry, None, table, table)
    most, extent = 0, config.segment_size
    while extent >= config.recluster_interval:
        block = geometry.block_clusters(extent, 1)
        for some, chunk_layers in clustering.chunks(orders, block):
            rows = torch.empty(orders, 4, dtype=torch.int32, device="meta")[some]
            batch = ClusteringBatch(geometry, rows, table, table, chunk_layers, block)
            held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
            held = [tensor for tensor in held if tensor is not table and tensor is not rows]
            most = max(most, sum(tensor.nbytes for tensor in held))
        extent //= 2
    return most


@pytest.mark.parametrize(
    ("segment_size", "layers", "heads", "dim"),
    [
        pytest.param(4096, 36, 8, 128, id="qwen3-8b"),
        pytest.param(2048, 30, 3, 64, id="smollm2-135m"),
        pytest.param(4096, 4, 1, 96, id="one-head"),
    ],
)
@pytest.mark.parametrize("builds", [1, 8])
def test_clustering_stays_within_the_scratch_that_is_charged(
    segment_size, layers, heads, dim, builds
):
    config = MultipoleConfig(segment_size=segment_size, max_builds_per_step=builds)
    charged = memory.clustering_scratch_bytes(config, layers, heads, dim, torch.bfloat16)
    held = scratch_held(config, layers, heads, dim, builds)
    assert 0.85 * charged <= held <= charged <= 512 * 2**20


def test_scratch_of_any_number_of_builds_is_bounded():
    strict = MultipoleConfig(segment_size=4096, strict_activation=True)
    charged = memory.clustering_scratch_bytes(strict, 36, 8, 128, torch.bfloat16)
    assert 0.85 * charged <= scratch_held(strict, 36, 8, 128, 1000) <= charged
    no_kernels = MultipoleConfig(segment_size=8192)
    charged = memory.clustering_scratch_bytes(no_kernels, 36, 8, 128, torch.bfloat16)
    assert charged == torch_clustering.MAX_SCRATCH
