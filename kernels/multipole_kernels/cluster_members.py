"""The size cap, then each cluster's members: a stable counting sort of tokens by cluster.

    reference.split_oversized; members = argsort(cluster_ids, stable) + sinks

A unit with a cluster above the cap loses its T // cap smallest clusters, whose tokens join the
nearest of the others; the large ones are cut into equal parts by position. All other units are only
sorted. The rank of a token in its cluster is counted tile by tile: tokens of its cluster in earlier
tiles, and before it in its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.clustering_batch import (
    ClusteringBatch,
    PoolPayload,
    load_order,
)
from multipole_kernels.kmeans import half_square, nearest

# ids compared with one another at a time
_SORTED_TOKENS = 128
# tokens that look for another cluster at a time
_NEAREST_TOKENS = 64


@triton.jit
def _load_ids(cluster_ids_ptr, begin, num_tokens, BLOCK_TOKENS: tl.constexpr):
    """[BLOCK_TOKENS] int32 cluster ids and which of them are tokens'; 0 behind the last."""
    offs_token = begin + tl.arange(0, BLOCK_TOKENS)
    is_token = offs_token < num_tokens
    return tl.load(cluster_ids_ptr + offs_token, mask=is_token, other=0).to(tl.int32), is_token


@triton.jit
def _cluster_sizes(
    cluster_ids_ptr, num_tokens, BLOCK_TOKENS: tl.constexpr, BLOCK_CLUSTERS: tl.constexpr
):
    """[BLOCK_CLUSTERS] int32, tokens."""
    sizes = tl.zeros([BLOCK_CLUSTERS], tl.int32)
    for begin in range(0, num_tokens, BLOCK_TOKENS):
        ids, is_token = _load_ids(cluster_ids_ptr, begin, num_tokens, BLOCK_TOKENS)
        sizes += tl.histogram(ids, BLOCK_CLUSTERS, mask=is_token)
    return sizes


@triton.jit
def _num_before(ids, BLOCK_TOKENS: tl.constexpr):
    """[BLOCK_TOKENS] int32: how many of the tokens before each have its cluster."""
    offs_token = tl.arange(0, BLOCK_TOKENS)
    is_before = (offs_token[None, :] < offs_token[:, None]) & (ids[None, :] == ids[:, None])
    return tl.sum(is_before.to(tl.int32), 1)


@triton.jit(do_not_specialize=["num_layers", "first_layer", "num_places"])
def _members_kernel(
    orders_ptr,
    features_ptr,  # [U, PADDED_TOKENS, BLOCK_DIM] fp16
    centroids_ptr,  # [U, BLOCK_CLUSTERS, BLOCK_DIM] fp16
    cluster_ids_ptr,  # [U, PADDED_TOKENS] int16
    cluster_sizes_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] int16
    member_begin_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] int16
    members_ptr,  # [L, P, NUM_KV_HEADS, SEGMENT_SIZE] int16
    num_layers,
    first_layer,
    num_places,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    CLUSTERS: tl.constexpr,
    MAX_CLUSTER_SIZE: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program takes one unit."""
    unit = tl.program_id(0).to(tl.int64)
    pair = unit // NUM_KV_HEADS
    _row, _segment, place, num_sinks, num_tokens, num_clusters = load_order(
        orders_ptr, pair // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    offs_token = tl.arange(0, BLOCK_TOKENS)
    offs_cluster = tl.arange(0, BLOCK_CLUSTERS)
    cluster_ids_ptr += unit * PADDED_TOKENS
    sizes = _cluster_sizes(cluster_ids_ptr, num_tokens, BLOCK_TOKENS, BLOCK_CLUSTERS)

    if tl.max(sizes, 0) > MAX_CLUSTER_SIZE:
        offs_dim = tl.arange(0, BLOCK_DIM)
        features_ptr += unit * PADDED_TOKENS * BLOCK_DIM
        centroids_ptr += unit * BLOCK_CLUSTERS * BLOCK_DIM
        # smallest first, a tie by number; clusters of padding come last
        key = tl.where(offs_cluster < num_clusters, sizes, SEGMENT_SIZE + 1) * BLOCK_CLUSTERS
        key += offs_cluster
        num_smaller = tl.sum((key[None, :] < key[:, None]).to(tl.int32), 1)
        is_dissolved = num_smaller < num_tokens // MAX_CLUSTER_SIZE
        centroids = tl.load(centroids_ptr + offs_cluster[:, None] * BLOCK_DIM + offs_dim[None, :])
        is_kept = (offs_cluster < num_clusters) & (is_dissolved == 0)
        half_squares = half_square(centroids, is_kept)
        for begin in range(0, num_tokens, TILE_TOKENS):
            ids, is_token = _load_ids(cluster_ids_ptr, begin, num_tokens, TILE_TOKENS)
            offs_row = begin + tl.arange(0, TILE_TOKENS)
            features = tl.load(features_ptr + offs_row[:, None] * BLOCK_DIM + offs_dim[None, :])
            is_moved = tl.gather(is_dissolved.to(tl.int32), ids, 0) > 0
            ids = tl.where(is_moved, nearest(features, centroids, half_squares), ids)
            tl.store(cluster_ids_ptr + offs_row, ids.to(tl.int16), mask=is_token)
        tl.debug_barrier()

        sizes = _cluster_sizes(cluster_ids_ptr, num_tokens, BLOCK_TOKENS, BLOCK_CLUSTERS)
        num_parts = (sizes + MAX_CLUSTER_SIZE - 1) // MAX_CLUSTER_SIZE
        first_part = tl.cumsum(num_parts, 0) - num_parts
        counted = tl.zeros([BLOCK_CLUSTERS], tl.int32)
        for begin in range(0, num_tokens, BLOCK_TOKENS):
            ids, is_token = _load_ids(cluster_ids_ptr, begin, num_tokens, BLOCK_TOKENS)
            rank = _num_before(ids, BLOCK_TOKENS) + tl.gather(counted, ids, 0)
            counted += tl.histogram(ids, BLOCK_CLUSTERS, mask=is_token)
            size = tl.maximum(tl.gather(sizes, ids, 0), 1)
            part = rank * tl.gather(num_parts, ids, 0) // size
            ids = tl.gather(first_part, ids, 0) + part
            tl.store(cluster_ids_ptr + begin + offs_token, ids.to(tl.int16), mask=is_token)
        tl.debug_barrier()
        sizes = _cluster_sizes(cluster_ids_ptr, num_tokens, BLOCK_TOKENS, BLOCK_CLUSTERS)

    first_member = tl.cumsum(sizes, 0) - sizes
    layer = first_layer + pair % num_layers
    # int64: layers * places * heads * tokens
    pool_row = (layer * num_places + place) * NUM_KV_HEADS + unit % NUM_KV_HEADS
    for first in range(0, CLUSTERS, BLOCK_CLUSTERS):
        # clusters beyond the order's have no tokens
        is_first = first == 0
        offs = first + offs_cluster
        size = tl.where(is_first, sizes, 0).to(tl.int16)
        tl.store(cluster_sizes_ptr + pool_row * CLUSTERS + offs, size, mask=offs < CLUSTERS)
        tl.store(
            member_begin_ptr + pool_row * CLUSTERS + offs,
            tl.where(is_first, first_member, 0).to(tl.int16),
            mask=offs < CLUSTERS,
        )
    members_ptr += pool_row * SEGMENT_SIZE
    counted = first_member
    for begin in range(0, num_tokens, BLOCK_TOKENS):
        ids, is_token = _load_ids(cluster_ids_ptr, begin, num_tokens, BLOCK_TOKENS)
        rank = _num_before(ids, BLOCK_TOKENS) + tl.gather(counted, ids, 0)
        counted += tl.histogram(ids, BLOCK_CLUSTERS, mask=is_token)
        member = (num_sinks + begin + offs_token).to(tl.int16)
        tl.store(members_ptr + rank, member, mask=is_token)


def sort_members(batch: ClusteringBatch, pool: PoolPayload) -> None:
    """Apply the size cap to batch.cluster_ids, then write sizes, member_begin and members."""
    geometry = batch.geometry
    block = batch.block_clusters * geometry.block_dim
    _members_kernel[(batch.num_units,)](
        features_ptr=batch.features,
        centroids_ptr=batch.centroids,
        cluster_ids_ptr=batch.cluster_ids,
        cluster_sizes_ptr=pool.cluster_sizes,
        member_begin_ptr=pool.member_begin,
        members_ptr=pool.members,
        first_layer=batch.layers.start,
        num_places=pool.num_places,
        SEGMENT_SIZE=geometry.segment_size,
        CLUSTERS=pool.clusters_per_segment,
        MAX_CLUSTER_SIZE=geometry.max_cluster_size,
        PADDED_TOKENS=batch.padded_tokens,
        TILE_TOKENS=_NEAREST_TOKENS,
        BLOCK_TOKENS=_SORTED_TOKENS,
        BLOCK_CLUSTERS=batch.block_clusters,
        BLOCK_DIM=geometry.block_dim,
        num_warps=4 if block <= 128 * 128 else 8,
        **batch.order_arguments(),
    )
