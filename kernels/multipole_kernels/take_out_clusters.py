"""Take selected clusters' centroids out of an attention state.

The opposite of what coarse_attention adds, from the same kept weights: their tokens are attended to
exactly instead. A cluster whose kept weight is 0 was not added and takes nothing out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.attention_state import (
    VALUE_FACTOR,
    dot,
    finite_or_zero,
    tail_above_score,
)


@triton.jit
def take_out_clusters(
    max_log2,  # [BLOCK_GROUP]
    weight_sum,
    acc,  # [BLOCK_D, BLOCK_GROUP]
    clusters_ptr,
    begin,
    end,
    step,  # from one tile to the next, at least BLOCK_CLUSTERS
    cluster,  # [BLOCK_CLUSTERS] the first tile's
    item_begin,
    head,
    item_place_ptr,
    value_centroids_ptr,
    value_scale_ptr,
    cluster_sizes_ptr,
    key_variance_ptr,
    cluster_weight_ptr,
    weight_shift_ptr,
    logit_spread_ptr,
    max_logit_variance,
    tail_bound,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TILE_CLUSTERS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The state with tiles of the clusters at clusters_ptr[begin:end] taken out, one every step."""
    offs_group = tl.arange(0, BLOCK_GROUP)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_dim = offs_dim < HEAD_DIM
    for first in range(begin, end, step):
        nth = first + tl.arange(0, BLOCK_CLUSTERS)
        mask = nth < end
        # [BLOCK_CLUSTERS]
        item = item_begin + cluster // CLUSTERS
        place = tl.load(item_place_ptr + item, mask=mask, other=0).to(tl.int64)
        within = (place * NUM_KV_HEADS + head) * CLUSTERS + cluster % CLUSTERS
        sizes = tl.load(cluster_sizes_ptr + within, mask=mask, other=0)
        variance = tl.load(key_variance_ptr + within, mask=mask, other=0.0)
        tile = item_begin * (CLUSTERS // TILE_CLUSTERS) + cluster // TILE_CLUSTERS
        # [BLOCK_CLUSTERS, BLOCK_GROUP]
        tile_head = (tile.to(tl.int64) * NUM_KV_HEADS + head)[:, None] * GROUP + offs_group[None, :]
        mask_weight = mask[:, None] & (offs_group < GROUP)[None, :]
        shift = tl.load(weight_shift_ptr + tile_head, mask=mask_weight, other=float("-inf"))
        spread = tl.load(logit_spread_ptr + tile_head, mask=mask_weight, other=0.0)
        weight = tl.load(
            cluster_weight_ptr + tile_head * TILE_CLUSTERS + (cluster % TILE_CLUSTERS)[:, None],
            mask=mask_weight,
            other=0.0,
        ).to(tl.float32)
        logit_variance = spread * variance[:, None]
        above_score = tail_above_score(logit_variance, sizes[:, None], max_logit_variance)
        new_max = tl.maximum(max_log2, tl.ceil(tl.max(shift, 0) + tail_bound))
        new_shift = finite_or_zero(new_max)
        # as coarse attention weighed it
        weight *= tl.exp2(above_score + (shift - new_shift[None, :]))
        rescale = tl.exp2(max_log2 - new_shift)
        # [BLOCK_D, BLOCK_CLUSTERS]
        values = tl.load(
            value_centroids_ptr + within[None, :] * HEAD_DIM + offs_dim[:, None],
            mask=mask[None, :] & mask_dim[:, None],
            other=0.0,
        )
        weight_sum = weight_sum * rescale - tl.sum(weight, 0)
        if HAS_SCALE:
            value_scale = tl.load(value_scale_ptr + within, mask=mask, other=0.0)
            weight *= (value_scale * VALUE_FACTOR)[:, None]
            taken_out = dot(values.to(tl.float16), weight.to(tl.float16)) / VALUE_FACTOR
        else:
            taken_out = dot(values, weight.to(DTYPE))
        acc = acc * rescale[None, :] - taken_out
        max_log2 = new_max
        cluster = tl.load(clusters_ptr + nth + step, mask=nth + step < end, other=0)
    return max_log2, weight_sum, acc
