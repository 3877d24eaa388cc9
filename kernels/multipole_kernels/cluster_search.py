"""The threshold of a selection, and the list of the clusters above it.

The threshold is found by search: the tokens of all clusters above a trial value are summed until
only one cluster is left between the bounds, or one value (ties). select_resident holds a row's
ranks in registers and tries three values a pass; select_streamed reads a row of any length again
in every trial.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.cluster_rank import load_sizes, rank_keys, row_lse_log2

# the interpreter calls a combine function once an element
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# a sum of sizes in the low bits, a count of clusters (modulo 2048) in the high ones
_SIZE_BITS = tl.constexpr(21)
_ONE_CLUSTER = tl.constexpr(1 << 21)
# distance of the trial values in the first pass over the keys: two octaves
_FIRST_STEP = tl.constexpr(2 << 23)
# no cluster is larger than a segment; a count that wraps to 0 or 1 has more tokens than this
_LARGEST_CLUSTER = tl.constexpr(1024)


@triton.jit
def _weighed_above(key, sizes, bound):
    """The packed sum of (1 cluster, its size) over the clusters with key > bound."""
    return tl.sum(tl.where((key > bound) & (sizes > 0), sizes + _ONE_CLUSTER, 0), 0)


@triton.jit
def _add_three(a_1, a_2, a_3, b_1, b_2, b_3):
    return a_1 + b_1, a_2 + b_2, a_3 + b_3


@triton.jit
def _sum_three(x_1, x_2, x_3):
    """Three sums for the latency of one."""
    if _INTERPRETED:
        return tl.sum(x_1, 0), tl.sum(x_2, 0), tl.sum(x_3, 0)
    else:
        return tl.reduce((x_1, x_2, x_3), 0, _add_three)


@triton.jit
def _tokens(packed):
    return packed & (_ONE_CLUSTER - 1)


@triton.jit
def _still_open(low, high, weighed_low, weighed_high):
    """Whether more than one cluster lies in (low, high], and more than one value."""
    between = weighed_low - weighed_high
    several = (between >> _SIZE_BITS) & 2047
    return ((several > 1) | (_tokens(between) > _LARGEST_CLUSTER)) & (high - low > 1)


@triton.jit
def _store_clusters(
    key,
    sizes,
    first_cluster,
    threshold,
    remaining,  # tokens left for the clusters that tie at the threshold
    best,  # the cluster to take although it does not fit, or -1
    num_clusters,
    clusters_ptr,
    BLOCK: tl.constexpr,
):
    """Append the clusters taken among BLOCK of a row's to its list.

    Returns the list's new length and the tokens remaining for later ties.
    """
    offs = tl.arange(0, BLOCK)
    taken = key > threshold
    if remaining > 0:
        tied_sizes = tl.where(key == threshold, sizes, 0)
        taken = taken | ((key == threshold) & (tl.cumsum(tied_sizes, 0) <= remaining))
        # a cluster that did not fit ends the list: nothing remains
        remaining -= tl.sum(tied_sizes, 0)
    taken = (taken & (sizes > 0)) | (first_cluster + offs == best)
    count = taken.to(tl.int32)
    rank = num_clusters + tl.cumsum(count, 0) - count
    tl.store(clusters_ptr + rank, first_cluster + offs, mask=taken)
    return num_clusters + tl.sum(count, 0), remaining


@triton.jit
def select_resident(
    item_begin,
    num_segments,
    head,
    part_begin,
    part_end,
    part_max_ptr,
    part_sum_ptr,
    budget,
    clusters_ptr,
    item_place_ptr,
    cluster_sizes_ptr,
    cluster_weight_ptr,
    weight_shift_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Select among a row's clusters, at most SEGMENTS * CLUSTERS, held in registers.

    Returns the number of clusters listed and of tokens in all clusters.
    """
    # what the coarse launch does not write is loaded before its end
    sizes = load_sizes(
        item_begin,
        0,
        num_segments,
        head,
        item_place_ptr,
        cluster_sizes_ptr,
        NUM_KV_HEADS,
        CLUSTERS,
        SEGMENTS,
    )
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    lse_log2 = row_lse_log2(
        part_max_ptr,
        part_sum_ptr,
        part_begin,
        part_end,
        head,
        NUM_KV_HEADS,
        GROUP,
        BLOCK_GROUP,
        BLOCK_PARTS,
    )
    key, sizes = rank_keys(
        sizes,
        item_begin,
        0,
        num_segments,
        head,
        lse_log2,
        cluster_weight_ptr,
        weight_shift_ptr,
        NUM_KV_HEADS,
        GROUP,
        BLOCK_GROUP,
        CLUSTERS,
        SEGMENTS,
    )
    best_key = tl.max(key, 0)
    weighed = tl.where(sizes > 0, sizes + _ONE_CLUSTER, 0)
    low = tl.full([], -1, tl.int32)
    high = best_key
    weighed_low = tl.sum(weighed, 0)
    weighed_high = tl.zeros([], tl.int32)
    num_clustered_tokens = _tokens(weighed_low)
    if num_clustered_tokens <= budget:
        high = low
        weighed_high = weighed_low
    # first look at the octaves just below the best, where the threshold almost always is
    step = tl.maximum(tl.minimum(_FIRST_STEP, (high - low) // 4), 1)
    while _still_open(low, high, weighed_low, weighed_high):
        # three trials falling from high; what passes low changes nothing
        trial_1 = tl.maximum(high - step, low)
        trial_2 = tl.maximum(high - 2 * step, low)
        trial_3 = tl.maximum(high - 3 * step, low)
        above_1, above_2, above_3 = _sum_three(
            tl.where(key > trial_1, weighed, 0),
            tl.where(key > trial_2, weighed, 0),
            tl.where(key > trial_3, weighed, 0),
        )
        # what fits the budget comes first: its last is the new high, the next is the new low
        if _tokens(above_1) > budget:
            low = trial_1
            weighed_low = above_1
        elif _tokens(above_2) > budget:
            high = trial_1
            weighed_high = above_1
            low = trial_2
            weighed_low = above_2
        elif _tokens(above_3) > budget:
            high = trial_2
            weighed_high = above_2
            low = trial_3
            weighed_low = above_3
        else:
            high = trial_3
            weighed_high = above_3
        step = tl.maximum((high - low) // 4, 1)
    # only where low and high are neighbours can clusters tie at high
    remaining = tl.where(high - low == 1, budget - _tokens(weighed_high), 0)
    best = tl.full([], -1, tl.int32)
    if (_tokens(weighed_high) == 0) & (budget > 0) & (best_key >= 0):
        offs = tl.arange(0, SEGMENTS * CLUSTERS)
        best = tl.min(tl.where(key == best_key, offs, SEGMENTS * CLUSTERS), 0)
    num_clusters, remaining = _store_clusters(
        key, sizes, 0, high, remaining, best, 0, clusters_ptr, SEGMENTS * CLUSTERS
    )
    return num_clusters, num_clustered_tokens


@triton.jit
def select_streamed(
    item_begin,
    num_segments,
    head,
    part_begin,
    part_end,
    part_max_ptr,
    part_sum_ptr,
    budget,
    clusters_ptr,
    keys_ptr,  # the row's and head's scratch
    stride_key_segment,
    item_place_ptr,
    cluster_sizes_ptr,
    cluster_weight_ptr,
    weight_shift_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """select_resident for a row of any length: keys and sizes are read again in every trial."""
    BLOCK: tl.constexpr = SEGMENTS * CLUSTERS
    offs = tl.arange(0, BLOCK)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    lse_log2 = row_lse_log2(
        part_max_ptr,
        part_sum_ptr,
        part_begin,
        part_end,
        head,
        NUM_KV_HEADS,
        GROUP,
        BLOCK_GROUP,
        BLOCK_PARTS,
    )
    # a key of 32 bits and a size in one int64 keep a trial at one load
    best_key = tl.full([], -1, tl.int32)
    weighed_low = tl.zeros([], tl.int32)
    for first in range(0, num_segments, SEGMENTS):
        sizes = load_sizes(
            item_begin,
            first,
            num_segments,
            head,
            item_place_ptr,
            cluster_sizes_ptr,
            NUM_KV_HEADS,
            CLUSTERS,
            SEGMENTS,
        )
        key, sizes = rank_keys(
            sizes,
            item_begin,
            first,
            num_segments,
            head,
            lse_log2,
            cluster_weight_ptr,
            weight_shift_ptr,
            NUM_KV_HEADS,
            GROUP,
            BLOCK_GROUP,
            CLUSTERS,
            SEGMENTS,
        )
        best_key = tl.maximum(best_key, tl.max(key, 0))
        weighed_low += _weighed_above(key, sizes, -1)
        packed = (key.to(tl.int64) << 16) | sizes.to(tl.int64)
        segment = first + offs // CLUSTERS
        tl.store(
            keys_ptr + segment * stride_key_segment + offs % CLUSTERS,
            packed,
            mask=segment < num_segments,
        )
    tl.debug_barrier()
    low = tl.full([], -1, tl.int32)
    high = best_key
    weighed_high = tl.zeros([], tl.int32)
    num_clustered_tokens = _tokens(weighed_low)
    if num_clustered_tokens <= budget:
        high = low
        weighed_high = weighed_low
    while _still_open(low, high, weighed_low, weighed_high):
        middle = low + (high - low) // 2
        weighed = tl.zeros([], tl.int32)
        for first in range(0, num_segments, SEGMENTS):
            key, sizes = _load_packed(
                keys_ptr, stride_key_segment, first, num_segments, CLUSTERS, SEGMENTS
            )
            weighed += _weighed_above(key, sizes, middle)
        if _tokens(weighed) <= budget:
            high = middle
            weighed_high = weighed
        else:
            low = middle
            weighed_low = weighed
    remaining = tl.where(high - low == 1, budget - _tokens(weighed_high), 0)
    takes_best = (_tokens(weighed_high) == 0) & (budget > 0) & (best_key >= 0)
    num_clusters = tl.zeros([], tl.int32)
    for first in range(0, num_segments, SEGMENTS):
        key, sizes = _load_packed(
            keys_ptr, stride_key_segment, first, num_segments, CLUSTERS, SEGMENTS
        )
        best = tl.full([], -1, tl.int32)
        if takes_best:
            candidate = tl.min(tl.where(key == best_key, offs, BLOCK), 0)
            if candidate < BLOCK:
                best = first * CLUSTERS + candidate
                takes_best = False
        num_clusters, remaining = _store_clusters(
            key, sizes, first * CLUSTERS, high, remaining, best, num_clusters, clusters_ptr, BLOCK
        )
    return num_clusters, num_clustered_tokens


@triton.jit
def _load_packed(
    keys_ptr,
    stride_key_segment,
    first_segment,
    num_segments,
    CLUSTERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    offs = tl.arange(0, SEGMENTS * CLUSTERS)
    segment = first_segment + offs // CLUSTERS
    packed = tl.load(
        keys_ptr + segment * stride_key_segment + offs % CLUSTERS,
        mask=segment < num_segments,
        other=-65536,  # key -1, size 0
    )
    return (packed >> 16).to(tl.int32), (packed & 65535).to(tl.int32)
