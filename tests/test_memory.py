"""The bytes that SGLang's budget is told are the bytes that are allocated."""

from __future__ import annotations

import pytest
import torch

from multipole_kernels.clustering_batch import ClusteringBatch
from multipole_kernels.segment_clustering import SegmentClustering, layers_of_slices
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


NUM_SMS = 132


def scratch_held(config: MultipoleConfig, layers: int, heads: int, dim: int, orders: int) -> int:
    """Scratch of a clustering of so many orders, of any extent, and of one in slices."""
    geometry = geometry_of(config, heads, dim, torch.bfloat16, dim // 2)
    table = torch.empty(layers, 4, dtype=torch.int64, device="meta")
    clustering = SegmentClustering(geometry, None, table, table)

    def of_batch(num_orders: int, some_layers: range) -> int:
        rows = torch.empty(num_orders, 4, dtype=torch.int32, device="meta")
        batch = ClusteringBatch(geometry, rows, table, table, some_layers, block)
        held = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        return sum(t.nbytes for t in held if t is not table and t is not rows)

    at_once = in_slices = 0
    extent = config.segment_size
    while extent >= config.recluster_interval:
        block = geometry.block_clusters(extent, 1)
        for some, some_layers in clustering.chunks(orders, block):
            at_once = max(at_once, of_batch(some.stop - some.start, some_layers))
        for some_layers in layers_of_slices(layers, heads, NUM_SMS):
            in_slices = max(in_slices, of_batch(1, some_layers))
        extent //= 2
    return at_once + in_slices


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
    charged = memory.clustering_scratch_bytes(config, layers, heads, dim, torch.bfloat16, NUM_SMS)
    held = scratch_held(config, layers, heads, dim, builds)
    assert 0.85 * charged <= held <= charged <= (512 + 160) * 2**20


def test_a_part_of_the_layers_gives_each_unit_a_multiprocessor():
    for layers, heads in ((36, 8), (80, 8), (36, 1), (4, 200)):
        parts = layers_of_slices(layers, heads, NUM_SMS)
        assert [layer for part in parts for layer in part] == list(range(layers))
        sizes = sorted(map(len, parts))
        assert sizes[-1] * heads <= NUM_SMS or sizes[-1] == 1
        assert sizes[-1] - sizes[0] <= 1


def test_scratch_of_any_number_of_builds_is_bounded():
    strict = MultipoleConfig(segment_size=4096, strict_activation=True)
    charged = memory.clustering_scratch_bytes(strict, 36, 8, 128, torch.bfloat16, NUM_SMS)
    assert 0.85 * charged <= scratch_held(strict, 36, 8, 128, 1000) <= charged
    no_kernels = MultipoleConfig(segment_size=8192)
    charged = memory.clustering_scratch_bytes(no_kernels, 36, 8, 128, torch.bfloat16, NUM_SMS)
    assert charged == torch_clustering.MAX_SCRATCH
