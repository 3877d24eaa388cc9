"""Cluster selection: each KV head's best clusters, whole, up to a token budget.

    rank(cluster) = sum over the query heads g of exp(score_g - lse_g)

lse_g is the log of the full denominator. Clusters are taken best first (a tie takes the lower
index) while their sizes sum to at most the budget; the first that does not fit ends the list; the
best is always taken unless the budget is 0 (reference.cluster_selection).

A rank is at least 0, so its bits order as an integer. The threshold is found by bisection: the
tokens of all clusters above a trial value are summed until only one cluster is left between the
bounds, or one value (ties). A row with up to `select_segments` segments is held in registers, a
longer one is read again in every trial.

The same launch merges the coarse parts, on multiprocessors that the selection leaves free if there
are any. A row without items selects nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attention_state import finite_or_zero, merge_parts
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer

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
def _row_lse_log2(
    part_max_ptr,
    part_sum_ptr,
    part_begin,
    part_end,
    head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """[BLOCK_GROUP] base-2 log of a row's full denominator, from its coarse parts."""
    offs_part = tl.arange(0, BLOCK_PARTS)
    offs_group = tl.arange(0, BLOCK_GROUP)
    lse_max = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    lse_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    for first in range(part_begin, part_end, BLOCK_PARTS):
        part = first + offs_part
        mask = (part < part_end)[None, :] & (offs_group < GROUP)[:, None]
        offsets = (part[None, :] * NUM_KV_HEADS + head) * GROUP + offs_group[:, None]
        # [BLOCK_GROUP, BLOCK_PARTS]
        part_max = tl.load(part_max_ptr + offsets, mask=mask, other=float("-inf"))
        part_sum = tl.load(part_sum_ptr + offsets, mask=mask, other=0.0)
        new_max = tl.maximum(lse_max, tl.max(part_max, 1))
        shift = finite_or_zero(new_max)
        lse_sum = lse_sum * tl.exp2(lse_max - shift)
        lse_sum += tl.sum(part_sum * tl.exp2(part_max - shift[:, None]), 1)
        lse_max = new_max
    return lse_max + tl.log2(lse_sum)


@triton.jit
def _load_sizes(
    item_begin,
    first_segment,  # of the row's, from which SEGMENTS are taken
    num_segments,
    head,
    item_place_ptr,
    cluster_sizes_ptr,
    NUM_KV_HEADS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """[SEGMENTS, CLUSTERS] sizes, 0 behind the row's end."""
    segment = first_segment + tl.arange(0, SEGMENTS)
    mask = segment < num_segments
    offs_cluster = tl.arange(0, CLUSTERS)
    place = tl.load(item_place_ptr + item_begin + segment, mask=mask, other=0).to(tl.int64)
    return tl.load(
        cluster_sizes_ptr
        + ((place * NUM_KV_HEADS + head) * CLUSTERS)[:, None]
        + offs_cluster[None, :],
        mask=mask[:, None],
        other=0,
    ).to(tl.int32)


@triton.jit
def _rank_keys(
    sizes,  # [SEGMENTS, CLUSTERS]
    item_begin,
    first_segment,
    num_segments,
    head,
    lse_log2,  # [BLOCK_GROUP]
    cluster_weight_ptr,
    weight_shift_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Ranks as integers, -1 for an empty cluster, and sizes: [SEGMENTS * CLUSTERS] each."""
    offs_group = tl.arange(0, BLOCK_GROUP)
    segment = first_segment + tl.arange(0, SEGMENTS)
    mask = segment < num_segments
    offs_cluster = tl.arange(0, CLUSTERS)
    item_head = (item_begin + segment).to(tl.int64) * NUM_KV_HEADS + head
    rank = tl.zeros([SEGMENTS, CLUSTERS], tl.float32)
    for group in tl.static_range(GROUP):
        group_lse = tl.sum(tl.where(offs_group == group, lse_log2, 0.0), 0)
        weight_shift = tl.load(
            weight_shift_ptr + item_head * GROUP + group, mask=mask, other=float("-inf")
        )
        weight = tl.load(
            cluster_weight_ptr
            + ((item_head * GROUP + group) * CLUSTERS)[:, None]
            + offs_cluster[None, :],
            mask=mask[:, None],
            other=0.0,
        )
        rank += weight.to(tl.float32) * tl.exp2(weight_shift - group_lse)[:, None]
    key = tl.where(sizes > 0, rank.to(tl.int32, bitcast=True), -1)
    return (
        tl.reshape(key, [SEGMENTS * CLUSTERS]),
        tl.reshape(sizes, [SEGMENTS * CLUSTERS]),
    )


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
def _store_slots(
    num_clusters,
    item_begin,
    head,
    clusters_ptr,
    slots_ptr,
    item_place_ptr,
    cluster_sizes_ptr,
    member_begin_ptr,
    members_ptr,
    segment_slots_ptr,
    NUM_KV_HEADS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    MAX_CLUSTER_SIZE: tl.constexpr,
    BLOCK_SELECTED: tl.constexpr,
):
    """Write the KV slots of the listed clusters' tokens and return their number."""
    offs_member = tl.arange(0, MAX_CLUSTER_SIZE)
    num_tokens = tl.zeros([], tl.int32)
    for first in range(0, num_clusters, BLOCK_SELECTED):
        nth = first + tl.arange(0, BLOCK_SELECTED)
        mask = nth < num_clusters
        # [BLOCK_SELECTED]
        cluster = tl.load(clusters_ptr + nth, mask=mask, other=0)
        place = tl.load(item_place_ptr + item_begin + cluster // CLUSTERS, mask=mask, other=0)
        place = place.to(tl.int64)
        within = (place * NUM_KV_HEADS + head) * CLUSTERS + cluster % CLUSTERS
        size = tl.load(cluster_sizes_ptr + within, mask=mask, other=0).to(tl.int32)
        begin = tl.load(member_begin_ptr + within, mask=mask, other=0).to(tl.int32)
        token = num_tokens + tl.cumsum(size, 0) - size
        # [BLOCK_SELECTED, MAX_CLUSTER_SIZE]
        mask_member = offs_member[None, :] < size[:, None]
        member = tl.load(
            members_ptr
            + ((place * NUM_KV_HEADS + head) * SEGMENT_SIZE + begin)[:, None]
            + offs_member[None, :],
            mask=mask_member,
            other=0,
        ).to(tl.int32)
        slot = tl.load(
            segment_slots_ptr + (place * SEGMENT_SIZE)[:, None] + member,
            mask=mask_member,
            other=0,
        )
        tl.store(slots_ptr + token[:, None] + offs_member[None, :], slot, mask=mask_member)
        num_tokens += tl.sum(size, 0)
    return num_tokens


@triton.jit
def _select_resident(
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
    sizes = _load_sizes(
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
    lse_log2 = _row_lse_log2(
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
    key, sizes = _rank_keys(
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
def _select_streamed(
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
    """_select_resident for a row of any length: keys and sizes are read again in every trial."""
    BLOCK: tl.constexpr = SEGMENTS * CLUSTERS
    offs = tl.arange(0, BLOCK)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    lse_log2 = _row_lse_log2(
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
        sizes = _load_sizes(
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
        key, sizes = _rank_keys(
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


@triton.jit
def _merge_row_head(
    row_head,
    chunk_indptr_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_acc_ptr,
    merged_max_ptr,
    merged_sum_ptr,
    merged_acc_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Merge the coarse parts of one (row, KV head) into one state."""
    row = row_head // NUM_KV_HEADS
    part = (row_head % NUM_KV_HEADS) * GROUP
    merged_max, merged_sum, acc = merge_parts(
        tl.full([BLOCK_GROUP], float("-inf"), tl.float32),
        tl.zeros([BLOCK_GROUP], tl.float32),
        tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32),
        part_max_ptr + part,
        part_sum_ptr + part,
        part_acc_ptr + part * HEAD_DIM,
        tl.load(chunk_indptr_ptr + row),
        tl.load(chunk_indptr_ptr + row + 1),
        NUM_KV_HEADS * GROUP,
        GROUP,
        HEAD_DIM,
        BLOCK_GROUP,
        BLOCK_D,
        PARTS_AT_ONCE,
    )
    offs_group = tl.arange(0, BLOCK_GROUP)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_group = offs_group < GROUP
    offs_head = row_head.to(tl.int64) * GROUP + offs_group
    tl.store(merged_max_ptr + offs_head, merged_max, mask=mask_group)
    tl.store(merged_sum_ptr + offs_head, merged_sum, mask=mask_group)
    tl.store(
        merged_acc_ptr + offs_head[:, None] * HEAD_DIM + offs_dim[None, :],
        acc,
        mask=mask_group[:, None] & (offs_dim < HEAD_DIM)[None, :],
    )


@triton.jit
def _cluster_selection_kernel(
    item_indptr_ptr,  # [num_rows + 1]
    item_place_ptr,  # [max_items]
    token_budget_ptr,  # [num_rows]
    chunk_indptr_ptr,  # [num_rows + 1]
    cluster_sizes_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] int16
    member_begin_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] int16
    members_ptr,  # [P, NUM_KV_HEADS, SEGMENT_SIZE] int16
    segment_slots_ptr,  # [P, SEGMENT_SIZE]
    cluster_weight_ptr,  # [max_items, NUM_KV_HEADS, GROUP, CLUSTERS] fp16
    weight_shift_ptr,  # [max_items, NUM_KV_HEADS, GROUP] fp32
    part_max_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    merged_max_ptr,  # [num_rows, NUM_KV_HEADS, GROUP] fp32
    merged_sum_ptr,
    merged_acc_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    cluster_keys_ptr,  # [max_items, NUM_KV_HEADS, CLUSTERS] int64, scratch of long rows
    selected_clusters_ptr,  # [num_rows, NUM_KV_HEADS, cluster_capacity]
    selected_slots_ptr,  # [num_rows, NUM_KV_HEADS, slot_capacity]
    num_selected_clusters_ptr,  # [num_rows, NUM_KV_HEADS]
    num_selected_tokens_ptr,
    num_clustered_tokens_ptr,
    num_rows,
    cluster_capacity,
    slot_capacity,
    budget_capacity,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    MAX_CLUSTER_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    BLOCK_SELECTED: tl.constexpr,
    FEW_SEGMENTS: tl.constexpr,
    MANY_SEGMENTS: tl.constexpr,
    STREAMS: tl.constexpr,
    MERGE_APART: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The first num_rows * NUM_KV_HEADS programs select; they or as many more merge."""
    pid = tl.program_id(0)
    num_row_heads = num_rows * NUM_KV_HEADS
    if pid >= num_row_heads:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        _merge_row_head(
            pid % num_row_heads,
            chunk_indptr_ptr,
            part_max_ptr,
            part_sum_ptr,
            part_acc_ptr,
            merged_max_ptr,
            merged_sum_ptr,
            merged_acc_ptr,
            NUM_KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_GROUP,
            BLOCK_D,
            PARTS_AT_ONCE,
        )
        return

    row = pid // NUM_KV_HEADS
    head = pid % NUM_KV_HEADS
    item_begin = tl.load(item_indptr_ptr + row)
    num_segments = tl.load(item_indptr_ptr + row + 1) - item_begin
    budget = tl.minimum(tl.load(token_budget_ptr + row), budget_capacity)
    part_begin = tl.load(chunk_indptr_ptr + row)
    part_end = tl.load(chunk_indptr_ptr + row + 1)
    if num_segments == 0:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        tl.store(num_selected_clusters_ptr + pid, 0)
        tl.store(num_selected_tokens_ptr + pid, 0)
        tl.store(num_clustered_tokens_ptr + pid, 0)
        if not MERGE_APART:
            _merge_row_head(
                pid % num_row_heads,
                chunk_indptr_ptr,
                part_max_ptr,
                part_sum_ptr,
                part_acc_ptr,
                merged_max_ptr,
                merged_sum_ptr,
                merged_acc_ptr,
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_GROUP,
                BLOCK_D,
                PARTS_AT_ONCE,
            )
        return

    clusters_ptr = selected_clusters_ptr + pid.to(tl.int64) * cluster_capacity
    if num_segments <= FEW_SEGMENTS:
        num_clusters, num_clustered_tokens = _select_resident(
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
            NUM_KV_HEADS,
            GROUP,
            BLOCK_GROUP,
            CLUSTERS,
            FEW_SEGMENTS,
            BLOCK_PARTS,
            OVERLAP,
        )
    elif STREAMS and num_segments > MANY_SEGMENTS:
        num_clusters, num_clustered_tokens = _select_streamed(
            item_begin,
            num_segments,
            head,
            part_begin,
            part_end,
            part_max_ptr,
            part_sum_ptr,
            budget,
            clusters_ptr,
            cluster_keys_ptr + (item_begin.to(tl.int64) * NUM_KV_HEADS + head) * CLUSTERS,
            NUM_KV_HEADS * CLUSTERS,
            item_place_ptr,
            cluster_sizes_ptr,
            cluster_weight_ptr,
            weight_shift_ptr,
            NUM_KV_HEADS,
            GROUP,
            BLOCK_GROUP,
            CLUSTERS,
            MANY_SEGMENTS,
            BLOCK_PARTS,
            OVERLAP,
        )
    else:
        num_clusters, num_clustered_tokens = _select_resident(
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
            NUM_KV_HEADS,
            GROUP,
            BLOCK_GROUP,
            CLUSTERS,
            MANY_SEGMENTS,
            BLOCK_PARTS,
            OVERLAP,
        )
    # the list is read back by other threads of the block
    tl.debug_barrier()
    num_tokens = _store_slots(
        num_clusters,
        item_begin,
        head,
        clusters_ptr,
        selected_slots_ptr + pid.to(tl.int64) * slot_capacity,
        item_place_ptr,
        cluster_sizes_ptr,
        member_begin_ptr,
        members_ptr,
        segment_slots_ptr,
        NUM_KV_HEADS,
        CLUSTERS,
        SEGMENT_SIZE,
        MAX_CLUSTER_SIZE,
        BLOCK_SELECTED,
    )
    tl.store(num_selected_clusters_ptr + pid, num_clusters)
    tl.store(num_selected_tokens_ptr + pid, num_tokens)
    tl.store(num_clustered_tokens_ptr + pid, num_clustered_tokens)
    if not MERGE_APART:
        _merge_row_head(
            pid % num_row_heads,
            chunk_indptr_ptr,
            part_max_ptr,
            part_sum_ptr,
            part_acc_ptr,
            merged_max_ptr,
            merged_sum_ptr,
            merged_acc_ptr,
            NUM_KV_HEADS,
            GROUP,
            HEAD_DIM,
            BLOCK_GROUP,
            BLOCK_D,
            PARTS_AT_ONCE,
        )


def cluster_selection(
    num_rows: int, pool_layer: PoolLayer, plan: DecodePlan, workspace: DecodeWorkspace
) -> None:
    """List the selected clusters and their tokens' slots, and merge the coarse parts.

    Runs after coarse_attention; plan.token_budget is cut to the workspace's budget_capacity.
    """
    config = workspace.config
    num_row_heads = num_rows * workspace.num_kv_heads
    many_segments = workspace.max_select_segments
    block_group = triton.next_power_of_2(workspace.gqa_group_size)
    block_d = triton.next_power_of_2(workspace.head_dim)
    # a second set of blocks merges, as long as it finds multiprocessors that select nothing
    merge_apart = 2 * num_row_heads <= config.num_sms
    _cluster_selection_kernel[(num_row_heads * (1 + merge_apart),)](
        item_indptr_ptr=plan.item_indptr,
        item_place_ptr=plan.item_place,
        token_budget_ptr=plan.token_budget,
        chunk_indptr_ptr=workspace.chunk_indptr,
        cluster_sizes_ptr=pool_layer.cluster_sizes,
        member_begin_ptr=pool_layer.member_begin,
        members_ptr=pool_layer.members,
        segment_slots_ptr=pool_layer.segment_slots,
        cluster_weight_ptr=workspace.cluster_weight,
        weight_shift_ptr=workspace.weight_shift_log2,
        part_max_ptr=workspace.part_max_log2,
        part_sum_ptr=workspace.part_sum,
        part_acc_ptr=workspace.part_acc,
        merged_max_ptr=workspace.coarse_max_log2,
        merged_sum_ptr=workspace.coarse_sum,
        merged_acc_ptr=workspace.coarse_acc,
        cluster_keys_ptr=workspace.cluster_keys,
        selected_clusters_ptr=workspace.selected_clusters,
        selected_slots_ptr=workspace.selected_slots,
        num_selected_clusters_ptr=workspace.num_selected_clusters,
        num_selected_tokens_ptr=workspace.num_selected_tokens,
        num_clustered_tokens_ptr=workspace.num_clustered_tokens,
        num_rows=num_rows,
        NUM_KV_HEADS=workspace.num_kv_heads,
        GROUP=workspace.gqa_group_size,
        HEAD_DIM=workspace.head_dim,
        CLUSTERS=workspace.clusters_per_segment,
        SEGMENT_SIZE=pool_layer.segment_slots.shape[1],
        cluster_capacity=workspace.selected_clusters.shape[2],
        slot_capacity=workspace.selected_capacity,
        budget_capacity=workspace.budget_capacity,
        MAX_CLUSTER_SIZE=triton.next_power_of_2(workspace.max_cluster_size),
        BLOCK_GROUP=block_group,
        BLOCK_PARTS=64,
        BLOCK_D=block_d,
        PARTS_AT_ONCE=config.merge_parts_at_once,
        BLOCK_SELECTED=128,
        FEW_SEGMENTS=min(config.select_segments[0], many_segments),
        MANY_SEGMENTS=many_segments,
        STREAMS=workspace.max_items_per_row > many_segments,
        MERGE_APART=merge_apart,
        OVERLAP=config.overlap_launches,
        num_warps=config.select_num_warps[many_segments > config.select_segments[0]],
        launch_pdl=config.overlap_launches,
    )
