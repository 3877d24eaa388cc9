"""Clustering in kernels, for the shapes that they take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multipole_kernels.clustering_batch import (
    KV_DTYPES,
    ClusteringGeometry,
    PoolPayload,
    make_layer_table,
)
from multipole_kernels.segment_clustering import SegmentClustering, supports
from sglang_multipole.cluster_pool import ClusterPool
from sglang_multipole.config import MultipoleConfig
from sglang_multipole.kv_layer import KVLayer


def geometry_of(
    config: MultipoleConfig,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    rotary_half: int,
) -> ClusteringGeometry | None:
    """What the kernels are compiled for, or None for shapes that they do not take."""
    geometry = ClusteringGeometry(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_half=rotary_half,
        kv_dtype=kv_dtype,
        segment_size=config.segment_size,
        num_sink_tokens=config.num_sink_tokens,
        tokens_per_cluster=config.tokens_per_cluster,
        max_cluster_size=config.max_cluster_size,
        num_lloyd_iters=config.num_lloyd_iters,
    )
    if kv_dtype in KV_DTYPES and supports(geometry, config.clusters_per_segment):
        return geometry
    return None


def make_clustering(
    pool: ClusterPool, layers: Sequence[KVLayer], req_to_token: torch.Tensor
) -> SegmentClustering | None:
    """The kernels over these layers, or None where they cannot cluster.

    They take segments of up to 256 clusters and up to 32,768 numbers in a segment's centroids (256
    clusters at head_dim 128), KV pools of 16 or 32 bits whose slots lie in a row, and one rotary
    dimension, with layers that have none.
    """
    config, shape = pool.config, pool.shape
    halves = {layer.cos.shape[1] for layer in layers if layer.cos is not None}
    rotary_half = max(halves, default=0)
    geometry = geometry_of(config, shape.num_kv_heads, shape.head_dim, shape.dtype, rotary_half)
    buffers = [b for layer in layers for b in (layer.key_buffer, layer.value_buffer)]
    if geometry is None or len(halves) > 1 or not all(buffer.is_contiguous() for buffer in buffers):
        return None
    payload = PoolPayload(
        key_centroids=pool.key_centroids,
        value_centroids=pool.value_centroids,
        key_scale=pool.key_scale,
        value_scale=pool.value_scale,
        cluster_sizes=pool.cluster_sizes,
        key_variance=pool.key_variance,
        pair_weight=pool.pair_weight,
        members=pool.members,
        member_begin=pool.member_begin,
    )
    table = make_layer_table(
        [layer.key_buffer for layer in layers],
        [layer.value_buffer for layer in layers],
        [layer.cos for layer in layers],
        [layer.sin for layer in layers],
    )
    return SegmentClustering(geometry, payload, table, req_to_token)
