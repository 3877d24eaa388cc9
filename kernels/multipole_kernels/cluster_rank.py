"""The rank of a cluster: the sum over the query heads g of exp(score_g - lse_g).

lse_g is the log of the full denominator, over the row's coarse parts. The kept weights are
exp(score - shift), so that a rank costs one multiplication a cluster and head. A rank is at least
0, so its bits order as an integer; an empty cluster has -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.attention_state import finite_or_zero


@triton.jit
def row_lse_log2(
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
def load_sizes(
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
def rank_keys(
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
