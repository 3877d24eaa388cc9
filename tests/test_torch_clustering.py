"""The PyTorch clustering against reference.cluster_segment, on the host and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from multipole_kernels.clustering_batch import PoolPayload
from sglang_multipole import torch_clustering
from sglang_multipole.cluster_pool import ClusterPool, PoolShape
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer
from sglang_multipole.torch_clustering import TorchClustering
from tests.clustering_case import ClusteringCase, make_clustering_case
from tests.test_segment_clustering import (
    ORDERS,
    assert_summary_matches,
    num_clusters,
    reference_ids,
)


def cluster_on(device: str, case: ClusteringCase, centroid_dtype: str) -> ClusteringCase:
    """The case with what TorchClustering stores on the device, brought back to the host."""
    geometry = case.geometry
    config = MultipoleConfig(
        segment_size=geometry.segment_size,
        recluster_interval=32,
        tokens_per_cluster=geometry.tokens_per_cluster,
        max_cluster_size_ratio=geometry.max_cluster_size // geometry.tokens_per_cluster,
        num_sink_tokens=geometry.num_sink_tokens,
        num_lloyd_iters=geometry.num_lloyd_iters,
        centroid_dtype=centroid_dtype,
    )
    shape = PoolShape(
        num_layers=len(case.keys),
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        num_slots=len(case.keys[0]),
        num_rows=len(case.req_to_token),
        dtype=geometry.kv_dtype,
        device=device,
    )
    pool = ClusterPool(config, shape, case.pool.members.shape[1])
    layers = [
        KVLayer(*(None if part is None else part.to(device) for part in layer))
        for layer in zip(case.keys, case.values, case.cos, case.sin, strict=True)
    ]
    TorchClustering(pool, layers, case.req_to_token.to(device)).cluster(ORDERS)
    stored = {
        field.name: getattr(pool, field.name).cpu() for field in dataclasses.fields(PoolPayload)
    }
    return dataclasses.replace(case, pool=PoolPayload(**stored))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "max_scratch", [1 << 30, 1], ids=["all-at-once", "one-layer-and-segment-at-once"]
)
def test_stores_the_references_clusters(device, max_scratch, monkeypatch):
    monkeypatch.setattr(torch_clustering, "MAX_SCRATCH", max_scratch)
    case = make_clustering_case(centroid_dtype=torch.int8, layers_without_rope=(1,), device="cpu")
    stored = cluster_on(device, case, "int8")
    for order in ORDERS:
        for layer in range(len(case.keys)):
            features, expected = reference_ids(case, layer, order)
            ids = stored.cluster_ids(layer, *order)
            # a near tie decided the other way moves the next centroids
            assert (ids == expected).float().mean() > (0.95 if device == "cuda" else 0.999)
            assert int(ids.max()) < num_clusters(case, features.shape[1])
            assert_summary_matches(stored, layer, order)


@pytest.mark.gpu
def test_scratch_stays_within_its_bound(monkeypatch):
    bound = 256 << 20
    monkeypatch.setattr(torch_clustering, "MAX_SCRATCH", bound)
    shape = {"num_layers": 6, "num_kv_heads": 4, "head_dim": 128, "segment_size": 2048}
    case = make_clustering_case(**shape, tokens_per_cluster=16, max_cluster_size=128)
    config = MultipoleConfig(segment_size=2048, recluster_interval=32)
    device = case.req_to_token.device
    sizes = PoolShape(6, 4, 128, len(case.keys[0]), 2, case.geometry.kv_dtype, device)
    pool = ClusterPool(config, sizes, case.pool.members.shape[1])
    layers = [
        KVLayer(*layer) for layer in zip(case.keys, case.values, case.cos, case.sin, strict=True)
    ]
    clustering = TorchClustering(pool, layers, case.req_to_token)
    clustering.cluster([(0, 1, 2048, 1)])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    clustering.cluster([(0, 1, 2048, 1), (1, 1, 2048, 2), (1, 2, 2048, 3)])
    assert torch.cuda.max_memory_allocated() - before <= bound
