"""The loop of coarse attention: a chunk's tiles of clusters, in one pass over both centroids.

Clusters are the rows of both products and query heads the columns. Of each tile the weights
exp(score - largest score of the tile) are kept in float16 and the attention state is built from
what was kept, so that a cluster can be taken out of it again to the last bit (take_out_clusters).
Keys in int8 are multiplied as they are, with queries in two terms of int8; other 8-bit numbers are
unpacked to float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.attention_state import (
    LOG2_E,
    VALUE_FACTOR,
    dot,
    finite_or_zero,
    tail_above_score,
)
from multipole_kernels.head_columns import load_heads, store_heads
from multipole_kernels.unpack_words import unpack_words

# halves of a first term's unit, which is what the second has to say, fit int8
SECOND_TERM = tl.constexpr(254)


@triton.jit
def attend_tiles(
    begin,  # tiles of the step: TILES of each item
    end,
    head,
    q_ptr,  # [GROUP, HEAD_DIM], at the row and KV head
    acc_ptr,  # [GROUP, HEAD_DIM] fp32, of the chunk and KV head; written
    key_centroids_ptr,  # [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM], float8 ones as int16 words
    value_centroids_ptr,  # the same, all 8-bit ones as int16 words
    key_scale_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32, with 8-bit centroids
    value_scale_ptr,
    cluster_sizes_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] int16
    key_variance_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32
    pair_weight_ptr,  # [P, NUM_KV_HEADS, HEAD_DIM / 2] fp32
    item_place_ptr,  # [max_items]
    cluster_weight_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP, TILE_CLUSTERS] fp16
    weight_shift_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP] fp32
    logit_spread_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP] fp32
    sm_scale,
    max_logit_variance,
    tail_bound,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,  # of a segment
    TILE_CLUSTERS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    IS_INT8: tl.constexpr,
    UNPACK_SCALE: tl.constexpr,
):
    """The state's (max_log2, weight_sum), [BLOCK_GROUP] each; its acc is stored."""
    TILES: tl.constexpr = CLUSTERS // TILE_CLUSTERS
    # a word is one element of 16 bits or two of 8, which are dimensions 2j and 2j + 1
    PER_WORD: tl.constexpr = 2 if EIGHT_BITS else 1
    WORDS: tl.constexpr = HEAD_DIM // PER_WORD
    BLOCK_WORDS: tl.constexpr = BLOCK_D // PER_WORD
    KEY_WORDS: tl.constexpr = HEAD_DIM if IS_INT8 else WORDS
    BLOCK_KEY_WORDS: tl.constexpr = BLOCK_D if IS_INT8 else BLOCK_WORDS
    HALF: tl.constexpr = HEAD_DIM // 2
    scale_log2 = sm_scale * LOG2_E
    offs_group = tl.arange(0, BLOCK_GROUP)
    mask_group = offs_group < GROUP
    offs_word = tl.arange(0, BLOCK_WORDS)
    offs_cluster = tl.arange(0, TILE_CLUSTERS)
    offs_key_word = tl.arange(0, BLOCK_KEY_WORDS)
    key_offsets = offs_cluster[:, None] * KEY_WORDS + offs_key_word[None, :]
    value_offsets = offs_cluster[None, :] * WORDS + offs_word[:, None]
    mask_keys = (offs_key_word < KEY_WORDS)[None, :]
    mask_values = (offs_word < WORDS)[:, None]
    max_log2 = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_WORDS, BLOCK_GROUP], tl.float32)
    # summed over the clusters' places in the end, not in every tile
    weight_sums = tl.zeros([TILE_CLUSTERS, BLOCK_GROUP], tl.float32)
    # [BLOCK_GROUP, BLOCK_D / 2] squares of the pairs of dimensions f and f + HEAD_DIM / 2
    offs_pair = tl.arange(0, BLOCK_D // 2)
    mask_pair = offs_pair < HALF
    pair_ptr = q_ptr + offs_group[:, None] * HEAD_DIM + offs_pair[None, :]
    mask_q_pair = mask_group[:, None] & mask_pair[None, :]
    q_first = tl.load(pair_ptr, mask=mask_q_pair, other=0.0).to(tl.float32) * sm_scale
    q_second = tl.load(pair_ptr + HALF, mask=mask_q_pair, other=0.0).to(tl.float32) * sm_scale
    q_square = q_first * q_first + q_second * q_second
    if IS_INT8:
        q = load_heads(q_ptr, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
        q_term, q_rest, q_unit = _int8_terms(q.to(tl.float32))
    elif EIGHT_BITS:
        # 8-bit numbers are exact in float16, and so is all of q that matters
        q_low = load_heads(q_ptr, 0, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
        q_high = load_heads(q_ptr, 1, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
        q_low16 = q_low.to(tl.float32).to(tl.float16)
        q_high16 = q_high.to(tl.float32).to(tl.float16)
    else:
        q = load_heads(q_ptr, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
    if EIGHT_BITS:
        acc_high = tl.zeros([BLOCK_WORDS, BLOCK_GROUP], tl.float32)

    # the small tensors of a tile are loaded while the one before it is computed: its place is known
    # two tiles ahead, because their addresses need it
    place = _load_place(item_place_ptr, begin, TILES)
    tile_place = place
    next_tile = tl.minimum(begin + 1, end - 1)
    next_place = _load_place(item_place_ptr, next_tile, TILES)
    cluster = _first_cluster(place, begin, head, NUM_KV_HEADS, CLUSTERS, TILE_CLUSTERS)
    sizes = tl.load(cluster_sizes_ptr + cluster + offs_cluster)
    variance = tl.load(key_variance_ptr + cluster + offs_cluster)
    pair = (place * NUM_KV_HEADS + head) * HALF + offs_pair
    pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_pair, other=0.0)
    if EIGHT_BITS:
        key_scale = tl.load(key_scale_ptr + cluster + offs_cluster)
        value_scale = tl.load(value_scale_ptr + cluster + offs_cluster)
    for tile in range(begin, end):
        cluster = _first_cluster(tile_place, tile, head, NUM_KV_HEADS, CLUSTERS, TILE_CLUSTERS)
        # [TILE_CLUSTERS, BLOCK_KEY_WORDS] and [BLOCK_WORDS, TILE_CLUSTERS]
        keys = tl.load(
            key_centroids_ptr + cluster * KEY_WORDS + key_offsets, mask=mask_keys, other=0
        )
        values = tl.load(
            value_centroids_ptr + cluster * WORDS + value_offsets, mask=mask_values, other=0
        )
        next_tile = tl.minimum(tile + 1, end - 1)
        tile_place = _load_place(item_place_ptr, next_tile, TILES)
        cluster = _first_cluster(next_place, next_tile, head, NUM_KV_HEADS, CLUSTERS, TILE_CLUSTERS)
        next_sizes = tl.load(cluster_sizes_ptr + cluster + offs_cluster)
        next_variance = tl.load(key_variance_ptr + cluster + offs_cluster)
        pair = (next_place * NUM_KV_HEADS + head) * HALF + offs_pair
        next_pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_pair, other=0.0)
        next_place = _load_place(item_place_ptr, tl.minimum(tile + 2, end - 1), TILES)

        # [TILE_CLUSTERS, BLOCK_GROUP]
        if EIGHT_BITS:
            next_key_scale = tl.load(key_scale_ptr + cluster + offs_cluster)
            next_value_scale = tl.load(value_scale_ptr + cluster + offs_cluster)
            if IS_INT8:
                # below 2^31: each product is at most 256 * 127^2
                scores = tl.dot(keys, q_term, out_dtype=tl.int32) * SECOND_TERM
                scores += tl.dot(keys, q_rest, out_dtype=tl.int32)
                scores = scores.to(tl.float32) * (q_unit * (scale_log2 / SECOND_TERM))[None, :]
                scores *= key_scale[:, None]
            else:
                keys_low, keys_high = unpack_words(keys, IS_INT8)
                scores = dot(keys_low, q_low16) + dot(keys_high, q_high16)
                scores *= key_scale[:, None] * (scale_log2 * UNPACK_SCALE)
        else:
            scores = dot(keys, q) * scale_log2
        scores = tl.where(sizes[:, None] > 0, scores, float("-inf"))

        # [BLOCK_GROUP]
        shift = finite_or_zero(tl.max(scores, 0))
        cluster_weight = tl.exp2(scores - shift[None, :]).to(tl.float16)
        offs_tile = (tile * NUM_KV_HEADS + head) * GROUP + offs_group.to(tl.int64)
        spread = tl.sum(q_square * pair_weight[None, :], 1)
        tl.store(weight_shift_ptr + offs_tile, shift, mask=mask_group)
        tl.store(logit_spread_ptr + offs_tile, spread, mask=mask_group)
        tl.store(
            cluster_weight_ptr + offs_tile[None, :] * TILE_CLUSTERS + offs_cluster[:, None],
            cluster_weight,
            mask=mask_group[None, :],
        )

        logit_variance = spread[None, :] * variance[:, None]
        above_score = tail_above_score(logit_variance, sizes[:, None], max_logit_variance)
        new_max = tl.maximum(max_log2, tl.ceil(shift + tail_bound))
        tail_shift = finite_or_zero(new_max)
        # from the rounded weight: what is taken out later is what is put in here
        weight = cluster_weight.to(tl.float32)
        weight *= tl.exp2(above_score + (shift - tail_shift)[None, :])
        rescale = tl.exp2(max_log2 - tail_shift)
        weight_sums = weight_sums * rescale[None, :] + weight
        max_log2 = new_max
        if EIGHT_BITS:
            scaled = (weight * (value_scale * VALUE_FACTOR)[:, None]).to(tl.float16)
            values_low, values_high = unpack_words(values, IS_INT8)
            acc = acc * rescale[None, :] + dot(values_low, scaled)
            acc_high = acc_high * rescale[None, :] + dot(values_high, scaled)
            key_scale = next_key_scale
            value_scale = next_value_scale
        else:
            acc = acc * rescale[None, :] + dot(values, weight.to(values.dtype))
        sizes = next_sizes
        variance = next_variance
        pair_weight = next_pair_weight
    if EIGHT_BITS:
        acc *= UNPACK_SCALE / VALUE_FACTOR
        acc_high *= UNPACK_SCALE / VALUE_FACTOR
    store_heads(acc_ptr, acc, 0, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
    if EIGHT_BITS:
        store_heads(acc_ptr, acc_high, 1, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
    return max_log2, tl.sum(weight_sums, 0)


@triton.jit
def _int8_terms(q):
    """q [D, heads] as unit * (first + second / SECOND_TERM): two int8 blocks, and unit [heads].

    The rest is at most 2^-17 of a head's largest number; bfloat16 rounds that one by up to 2^-9.
    """
    # a head of zeros has any unit
    unit = tl.maximum(tl.max(tl.abs(q), 0), 1e-30) / 127.0
    units = q / unit[None, :]
    first = tl.floor(units + 0.5)
    second = tl.floor((units - first) * SECOND_TERM + 0.5)
    return first.to(tl.int8), second.to(tl.int8), unit


@triton.jit
def _load_place(item_place_ptr, tile, TILES: tl.constexpr):
    return tl.load(item_place_ptr + tile // TILES).to(tl.int64)


@triton.jit
def _first_cluster(
    place,
    tile,
    head,
    NUM_KV_HEADS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TILE_CLUSTERS: tl.constexpr,
):
    """The tile's first cluster in the pool's tables."""
    within = tile % (CLUSTERS // TILE_CLUSTERS) * TILE_CLUSTERS
    return (place * NUM_KV_HEADS + head) * CLUSTERS + within
