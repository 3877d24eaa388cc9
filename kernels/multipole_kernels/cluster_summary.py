"""What attention sees of a cluster: mean key, mean value, variance, in the pool's dtype.

    key_centroid = mean of the members' keys with RoPE; value_centroid likewise
    key_variance = mean over members and dimensions of (key - key_centroid)^2
    pair_weight  = the same by pairs of dimensions (f, f + D/2) over all clusters, of mean 1
                                          (reference.summarize_clusters, quantize_centroids)

A cluster's members lie in a row of the pool's `members`, so that each key and value is read from
the KV pool once, and its keys again, from the cache, for the variance. An empty cluster is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from multipole_kernels.clustering_batch import (
    CLUSTERS_PER_PROGRAM,
    ClusteringBatch,
    PoolPayload,
    load_order,
    load_pointer,
    num_parts_of,
)
from multipole_kernels.eight_bits import float8_bits, rounded

# tokens of a cluster in registers at a time
_BLOCK_MEMBERS = 16


@triton.jit
def _load_slots(members_ptr, table_ptr, begin, end, BLOCK_MEMBERS: tl.constexpr):
    """[BLOCK_MEMBERS] int64 KV slots of the members from begin on, and which are there."""
    offs = begin + tl.arange(0, BLOCK_MEMBERS)
    mask = offs < end
    member = tl.load(members_ptr + offs, mask=mask, other=0).to(tl.int32)
    return tl.load(table_ptr + member, mask=mask, other=0).to(tl.int64), mask


@triton.jit
def _store_centroid(
    centroid_ptr,  # [HEAD_DIM]
    scale_ptr,
    mean,
    offs_dim,
    IS_INT8: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    mask_dim = offs_dim < HEAD_DIM
    if IS_INT8 or IS_FLOAT8:
        largest = tl.max(tl.abs(mean), 0)
        LARGEST_NUMBER: tl.constexpr = 127.0 if IS_INT8 else 448.0
        scale = tl.where(largest > 0.0, tl.div_rn(largest, LARGEST_NUMBER), 1.0)
        tl.store(scale_ptr, scale)
        mean = tl.div_rn(mean, scale)
        if IS_INT8:
            number = rounded(mean)
        else:
            number = float8_bits(mean)
        tl.store(centroid_ptr + offs_dim, number.to(tl.int8), mask=mask_dim)
    else:
        number = mean.to(centroid_ptr.dtype.element_ty)
        tl.store(centroid_ptr + offs_dim, number, mask=mask_dim)


@triton.jit(do_not_specialize=["num_layers", "first_layer", "num_places", "num_parts"])
def _summary_kernel(
    orders_ptr,
    layer_table_ptr,
    req_to_token_ptr,
    cluster_sizes_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] int16
    member_begin_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] int16
    members_ptr,  # [L, P, NUM_KV_HEADS, SEGMENT_SIZE] int16
    key_centroids_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM], 8-bit ones as int8
    value_centroids_ptr,
    key_scale_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] fp32, with 8-bit centroids
    value_scale_ptr,
    key_variance_ptr,  # [L, P, NUM_KV_HEADS, CLUSTERS] fp32
    spread_ptr,  # [U, num_parts, BLOCK_DIM] fp32
    num_layers,
    first_layer,
    num_places,
    num_parts,
    stride_table_row,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    CLUSTERS: tl.constexpr,
    CLUSTERS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    KV_DTYPE: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
):
    """One program takes some clusters of one unit, one after another."""
    part = tl.program_id(0) % num_parts
    unit = (tl.program_id(0) // num_parts).to(tl.int64)
    head = unit % NUM_KV_HEADS
    pair = unit // NUM_KV_HEADS
    row, segment, place, _, _, num_clusters = load_order(
        orders_ptr, pair // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    first_cluster = part * CLUSTERS_PER_PROGRAM
    if first_cluster >= num_clusters:
        return
    layer_ptr = layer_table_ptr + pair % num_layers * 4
    keys_ptr = load_pointer(layer_ptr, KV_DTYPE) + head * HEAD_DIM
    values_ptr = load_pointer(layer_ptr + 1, KV_DTYPE) + head * HEAD_DIM
    STRIDE_SLOT: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    table_ptr = req_to_token_ptr + row * stride_table_row + segment * SEGMENT_SIZE
    pool_row = ((first_layer + pair % num_layers) * num_places + place) * NUM_KV_HEADS + head
    members_ptr += pool_row * SEGMENT_SIZE

    offs_dim = tl.arange(0, BLOCK_DIM)
    mask_dim = offs_dim < HEAD_DIM
    unit_spread = tl.zeros([BLOCK_DIM], tl.float32)
    for cluster in range(first_cluster, min(first_cluster + CLUSTERS_PER_PROGRAM, num_clusters)):
        pool_cluster = pool_row * CLUSTERS + cluster
        size = tl.load(cluster_sizes_ptr + pool_cluster).to(tl.int32)
        begin = tl.load(member_begin_ptr + pool_cluster).to(tl.int32)
        key_sum = tl.zeros([BLOCK_DIM], tl.float32)
        value_sum = tl.zeros([BLOCK_DIM], tl.float32)
        for first in range(begin, begin + size, BLOCK_MEMBERS):
            slots, mask = _load_slots(members_ptr, table_ptr, first, begin + size, BLOCK_MEMBERS)
            # [BLOCK_MEMBERS, BLOCK_DIM]
            offs = slots[:, None] * STRIDE_SLOT + offs_dim[None, :]
            mask = mask[:, None] & mask_dim[None, :]
            keys = tl.load(keys_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            values = tl.load(values_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            key_sum += tl.sum(keys, 0)
            value_sum += tl.sum(values, 0)
        count = tl.maximum(size, 1).to(tl.float32)
        key_mean, value_mean = key_sum / count, value_sum / count
        spread = tl.zeros([BLOCK_DIM], tl.float32)
        for first in range(begin, begin + size, BLOCK_MEMBERS):
            slots, mask = _load_slots(members_ptr, table_ptr, first, begin + size, BLOCK_MEMBERS)
            offs = slots[:, None] * STRIDE_SLOT + offs_dim[None, :]
            mask = mask[:, None] & mask_dim[None, :]
            keys = tl.load(keys_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            difference = tl.where(mask, keys - key_mean[None, :], 0.0)
            spread += tl.sum(difference * difference, 0)
        unit_spread += spread
        tl.store(key_variance_ptr + pool_cluster, tl.sum(spread, 0) / (count * HEAD_DIM))
        _store_centroid(
            key_centroids_ptr + pool_cluster * HEAD_DIM,
            key_scale_ptr + pool_cluster if IS_INT8 or IS_FLOAT8 else None,
            key_mean,
            offs_dim,
            IS_INT8,
            IS_FLOAT8,
            HEAD_DIM,
        )
        _store_centroid(
            value_centroids_ptr + pool_cluster * HEAD_DIM,
            value_scale_ptr + pool_cluster if IS_INT8 or IS_FLOAT8 else None,
            value_mean,
            offs_dim,
            IS_INT8,
            IS_FLOAT8,
            HEAD_DIM,
        )
    tl.store(spread_ptr + (unit * num_parts + part) * BLOCK_DIM + offs_dim, unit_spread)


@triton.jit(do_not_specialize=["num_layers", "first_layer", "num_places", "num_parts"])
def _pair_weight_kernel(
    orders_ptr,
    spread_ptr,  # [U, num_parts, BLOCK_DIM] fp32
    pair_weight_ptr,  # [L, P, NUM_KV_HEADS, HEAD_DIM / 2] fp32
    num_layers,
    first_layer,
    num_places,
    num_parts,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    CLUSTERS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """One program takes one unit."""
    unit = tl.program_id(0).to(tl.int64)
    pair = unit // NUM_KV_HEADS
    _, _, place, _, _, num_clusters = load_order(
        orders_ptr, pair // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_part = tl.arange(0, BLOCK_PARTS)
    offs_pair = tl.arange(0, BLOCK_DIM // 2)
    mask_pair = offs_pair < HALF
    mask = (offs_part * CLUSTERS_PER_PROGRAM < num_clusters)[:, None] & mask_pair[None, :]
    ptrs = spread_ptr + (unit * num_parts + offs_part[:, None]) * BLOCK_DIM + offs_pair[None, :]
    spread = tl.load(ptrs, mask=mask, other=0.0) + tl.load(ptrs + HALF, mask=mask, other=0.0)
    # [BLOCK_DIM / 2]
    of_pair = tl.sum(spread, 0)
    mean = tl.sum(of_pair, 0) / HALF
    # keys that are all equal have no variance to spread
    weight = tl.where(mean > 0.0, of_pair / mean, 1.0)
    pool_row = (first_layer + pair % num_layers) * num_places + place
    pool_row = pool_row * NUM_KV_HEADS + unit % NUM_KV_HEADS
    tl.store(pair_weight_ptr + pool_row * HALF + offs_pair, weight, mask=mask_pair)


def summarize(batch: ClusteringBatch, pool: PoolPayload) -> None:
    """Write the centroids, scales, variances and pair weights of the clusters in pool.members."""
    geometry, dtype = batch.geometry, pool.key_centroids.dtype
    num_parts = batch.spread.shape[1]
    is_eight_bits = dtype.itemsize == 1
    shared = batch.order_arguments() | {
        "spread_ptr": batch.spread,
        "first_layer": batch.layers.start,
        "num_places": pool.num_places,
        "CLUSTERS_PER_PROGRAM": CLUSTERS_PER_PROGRAM,
        "num_parts": num_parts,
    }
    _summary_kernel[(batch.num_units * num_parts,)](
        cluster_sizes_ptr=pool.cluster_sizes,
        member_begin_ptr=pool.member_begin,
        members_ptr=pool.members,
        key_centroids_ptr=_as_stored(pool.key_centroids),
        value_centroids_ptr=_as_stored(pool.value_centroids),
        key_scale_ptr=pool.key_scale,
        value_scale_ptr=pool.value_scale,
        key_variance_ptr=pool.key_variance,
        CLUSTERS=pool.clusters_per_segment,
        BLOCK_MEMBERS=_BLOCK_MEMBERS,
        IS_INT8=dtype == torch.int8,
        IS_FLOAT8=is_eight_bits and dtype != torch.int8,
        num_warps=1,
        **shared,
        **batch.kv_arguments(),
    )
    _pair_weight_kernel[(batch.num_units,)](
        pair_weight_ptr=pool.pair_weight,
        HEAD_DIM=geometry.head_dim,
        BLOCK_DIM=geometry.block_dim,
        # of a whole segment, so that shorter ones need no kernel of their own
        BLOCK_PARTS=triton.next_power_of_2(num_parts_of(pool.clusters_per_segment)),
        num_warps=2,
        **shared,
    )


def _as_stored(centroids: torch.Tensor) -> torch.Tensor:
    """8-bit centroids as bytes."""
    return centroids.view(torch.int8) if centroids.dtype.itemsize == 1 else centroids
