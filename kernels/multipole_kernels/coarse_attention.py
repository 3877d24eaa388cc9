"""Coarse attention: every cluster by its centroid, every always-exact token as it is.

For each item (a usable segment of a row) and KV head, in one pass over both centroids:

    score = q . key_centroid * sm_scale
    spread = sum over f of pair_weight_f * (q_f^2 + q_(f + D/2)^2) * sm_scale^2, of the segment
    tail  = score + min(spread * key_variance, max_logit_variance) / 2 + log(size)
    state += exp(tail) * value_centroid                      (reference.centroid_attention)

The selection that follows needs the full denominator, which this pass alone can give; it therefore
attends to all clusters, and the third launch takes the selected ones out again. What it keeps of
the scores is exp(score - the segment's largest score) in float16: a rounding of 2^-11 of the
cluster's own weight, at a quarter of the traffic of float32 scores written and read.

An empty cluster (size 0) has weight 0. A chunk without work leaves at once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attention_state import (
    LOG2_E,
    VALUE_FACTOR,
    attend_slots,
    dot,
    finite_or_zero,
    tail_above_score,
    tail_bound,
)
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.unpack_words import unpack_words

# of the tiles that a block loads ahead, in shared memory
_MAX_TILE_BYTES = 192 * 1024


@triton.jit(do_not_specialize=["num_rows"])
def _coarse_attention_kernel(
    q_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_slots, NUM_KV_HEADS, HEAD_DIM]
    v_cache_ptr,
    key_centroids_ptr,  # [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM], 8-bit ones as int16 words
    value_centroids_ptr,
    key_scale_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32, with 8-bit centroids
    value_scale_ptr,
    cluster_sizes_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] int16
    key_variance_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32
    pair_weight_ptr,  # [P, NUM_KV_HEADS, HEAD_DIM / 2] fp32
    item_place_ptr,  # [max_items]
    exact_slots_ptr,  # [max_exact]
    chunk_row_ptr,  # [max_chunks]
    chunk_is_exact_ptr,
    chunk_begin_ptr,
    chunk_end_ptr,
    chunk_indptr_ptr,  # [num_rows + 1]
    cluster_weight_ptr,  # [max_items, NUM_KV_HEADS, GROUP, CLUSTERS] fp16
    weight_shift_ptr,  # [max_items, NUM_KV_HEADS, GROUP] fp32
    logit_spread_ptr,  # [max_items, NUM_KV_HEADS, GROUP] fp32
    part_max_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    num_rows,
    sm_scale,
    max_logit_variance,
    tail_bound,
    stride_q_row,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    EIGHT_BITS: tl.constexpr,
    IS_INT8: tl.constexpr,
    UNPACK_SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program takes one chunk of one KV head."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    # all at once: what lies behind the last chunk is read, not used
    num_chunks = tl.load(chunk_indptr_ptr + num_rows)
    row = tl.load(chunk_row_ptr + chunk).to(tl.int64)
    begin = tl.load(chunk_begin_ptr + chunk)
    end = tl.load(chunk_end_ptr + chunk)
    is_exact = tl.load(chunk_is_exact_ptr + chunk)
    if chunk >= num_chunks:
        return

    offs_group = tl.arange(0, BLOCK_GROUP)
    mask_group = offs_group < GROUP
    q_ptr += row * stride_q_row + head * GROUP * HEAD_DIM
    # int64: chunks * heads * head_dim
    part = (chunk.to(tl.int64) * NUM_KV_HEADS + head) * GROUP
    max_log2 = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    part_acc_ptr += part * HEAD_DIM
    scale_log2 = sm_scale * LOG2_E

    if is_exact != 0:
        q_heads = _load_heads(q_ptr, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
        offs_token = tl.arange(0, BLOCK_TOKENS)
        token_acc = tl.zeros([BLOCK_D, BLOCK_GROUP], tl.float32)
        max_log2, weight_sum, token_acc = attend_slots(
            max_log2,
            weight_sum,
            token_acc,
            q_heads,
            exact_slots_ptr,
            begin,
            end,
            BLOCK_TOKENS,
            tl.load(exact_slots_ptr + begin + offs_token, mask=begin + offs_token < end, other=0),
            k_cache_ptr + head * HEAD_DIM,
            v_cache_ptr + head * HEAD_DIM,
            stride_slot,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_TOKENS,
        )
        _store_heads(part_acc_ptr, token_acc, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
    else:
        # a word is one element of 16 bits or two of 8, which are dimensions 2j and 2j + 1
        PER_WORD: tl.constexpr = 2 if EIGHT_BITS else 1
        WORDS: tl.constexpr = HEAD_DIM // PER_WORD
        BLOCK_WORDS: tl.constexpr = BLOCK_D // PER_WORD
        offs_word = tl.arange(0, BLOCK_WORDS)
        offs_cluster = tl.arange(0, CLUSTERS)
        key_offsets = offs_cluster[:, None] * WORDS + offs_word[None, :]
        value_offsets = offs_cluster[None, :] * WORDS + offs_word[:, None]
        mask_keys = (offs_word < WORDS)[None, :]
        mask_values = (offs_word < WORDS)[:, None]
        # a query head is a column: clusters are the rows of both products
        q = _load_heads(q_ptr, 0, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
        acc = tl.zeros([BLOCK_WORDS, BLOCK_GROUP], tl.float32)
        # summed over the clusters' places in the end, not in every item
        weight_sums = tl.zeros([CLUSTERS, BLOCK_GROUP], tl.float32)
        # [BLOCK_GROUP, BLOCK_D / 2] squares of the pairs of dimensions f and f + HEAD_DIM / 2
        HALF: tl.constexpr = HEAD_DIM // 2
        offs_pair = tl.arange(0, BLOCK_D // 2)
        mask_pair = offs_pair < HALF
        pair_ptr = q_ptr + offs_group[:, None] * HEAD_DIM + offs_pair[None, :]
        mask_q_pair = mask_group[:, None] & mask_pair[None, :]
        q_first = tl.load(pair_ptr, mask=mask_q_pair, other=0.0).to(tl.float32) * sm_scale
        q_second = tl.load(pair_ptr + HALF, mask=mask_q_pair, other=0.0).to(tl.float32) * sm_scale
        q_square = q_first * q_first + q_second * q_second
        if EIGHT_BITS:
            q_high = _load_heads(q_ptr, 1, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
            acc_high = tl.zeros([BLOCK_WORDS, BLOCK_GROUP], tl.float32)
            # 8-bit numbers are exact in float16, and so is all of q that matters
            q_low16 = q.to(tl.float32).to(tl.float16)
            q_high16 = q_high.to(tl.float32).to(tl.float16)

        # the small tensors of an item are loaded while the one before it is computed: two places
        # ahead, because their addresses need the place
        place = tl.load(item_place_ptr + begin).to(tl.int64)
        next_place = tl.load(item_place_ptr + tl.minimum(begin + 1, end - 1)).to(tl.int64)
        tile_place = place
        cluster = (place * NUM_KV_HEADS + head) * CLUSTERS + offs_cluster
        sizes = tl.load(cluster_sizes_ptr + cluster)
        variance = tl.load(key_variance_ptr + cluster)
        pair = (place * NUM_KV_HEADS + head) * HALF + offs_pair
        pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_pair, other=0.0)
        if EIGHT_BITS:
            key_scale = tl.load(key_scale_ptr + cluster)
            value_scale = tl.load(value_scale_ptr + cluster)
        for item in range(begin, end):
            tile = (tile_place * NUM_KV_HEADS + head) * (CLUSTERS * WORDS)
            # [CLUSTERS, BLOCK_WORDS] and [BLOCK_WORDS, CLUSTERS]
            keys = tl.load(key_centroids_ptr + tile + key_offsets, mask=mask_keys, other=0)
            values = tl.load(value_centroids_ptr + tile + value_offsets, mask=mask_values, other=0)
            tile_place = tl.load(item_place_ptr + tl.minimum(item + 1, end - 1)).to(tl.int64)
            cluster = (next_place * NUM_KV_HEADS + head) * CLUSTERS + offs_cluster
            next_sizes = tl.load(cluster_sizes_ptr + cluster)
            next_variance = tl.load(key_variance_ptr + cluster)
            pair = (next_place * NUM_KV_HEADS + head) * HALF + offs_pair
            next_pair_weight = tl.load(pair_weight_ptr + pair, mask=mask_pair, other=0.0)
            next_place = tl.load(item_place_ptr + tl.minimum(item + 2, end - 1)).to(tl.int64)

            # [CLUSTERS, BLOCK_GROUP]
            if EIGHT_BITS:
                next_key_scale = tl.load(key_scale_ptr + cluster)
                next_value_scale = tl.load(value_scale_ptr + cluster)
                keys_low, keys_high = unpack_words(keys, IS_INT8)
                scores = dot(keys_low, q_low16) + dot(keys_high, q_high16)
                scores *= key_scale[:, None] * (scale_log2 * UNPACK_SCALE)
            else:
                scores = dot(keys, q) * scale_log2
            scores = tl.where(sizes[:, None] > 0, scores, float("-inf"))

            # [BLOCK_GROUP]
            shift = finite_or_zero(tl.max(scores, 0))
            cluster_weight = tl.exp2(scores - shift[None, :]).to(tl.float16)
            offs_item = (item * NUM_KV_HEADS + head) * GROUP + offs_group.to(tl.int64)
            spread = tl.sum(q_square * pair_weight[None, :], 1)
            tl.store(weight_shift_ptr + offs_item, shift, mask=mask_group)
            tl.store(logit_spread_ptr + offs_item, spread, mask=mask_group)
            tl.store(
                cluster_weight_ptr + offs_item[None, :] * CLUSTERS + offs_cluster[:, None],
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
        weight_sum = tl.sum(weight_sums, 0)
        if EIGHT_BITS:
            acc *= UNPACK_SCALE / VALUE_FACTOR
            acc_high *= UNPACK_SCALE / VALUE_FACTOR
        _store_heads(part_acc_ptr, acc, 0, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS)
        if EIGHT_BITS:
            _store_heads(
                part_acc_ptr, acc_high, 1, PER_WORD, GROUP, WORDS, BLOCK_GROUP, BLOCK_WORDS
            )

    tl.store(part_max_ptr + part + offs_group, max_log2, mask=mask_group)
    tl.store(part_sum_ptr + part + offs_group, weight_sum, mask=mask_group)


@triton.jit
def _head_offsets(
    first,
    STEP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """[BLOCK_DIMS, BLOCK_GROUP] offsets of dimensions first, first + STEP, ... of the heads."""
    offs_group = tl.arange(0, BLOCK_GROUP)[None, :]
    offs_dim = tl.arange(0, BLOCK_DIMS)[:, None]
    return offs_group * (DIMS * STEP) + offs_dim * STEP + first


@triton.jit
def _head_mask(
    GROUP: tl.constexpr, DIMS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIMS: tl.constexpr
):
    return (tl.arange(0, BLOCK_GROUP) < GROUP)[None, :] & (tl.arange(0, BLOCK_DIMS) < DIMS)[:, None]


@triton.jit
def _load_heads(
    ptr,
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    offsets = _head_offsets(first, STEP, DIMS, BLOCK_GROUP, BLOCK_DIMS)
    return tl.load(ptr + offsets, mask=_head_mask(GROUP, DIMS, BLOCK_GROUP, BLOCK_DIMS), other=0.0)


@triton.jit
def _store_heads(
    ptr,
    block,
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    offsets = _head_offsets(first, STEP, DIMS, BLOCK_GROUP, BLOCK_DIMS)
    tl.store(ptr + offsets, block, mask=_head_mask(GROUP, DIMS, BLOCK_GROUP, BLOCK_DIMS))


def coarse_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pool_layer: PoolLayer,
    plan: DecodePlan,
    workspace: DecodeWorkspace,
    sm_scale: float,
    max_logit_variance: float,
) -> None:
    """Fill the workspace's cluster weights and one attention state per chunk.

    Args:
        q: [num_rows, num_q_heads, head_dim], query heads of a KV head adjacent.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim].
    """
    num_rows = q.shape[0]
    config = workspace.config
    key_centroids, value_centroids = pool_layer.key_centroids, pool_layer.value_centroids
    eight_bits = pool_layer.key_scale is not None
    is_int8 = key_centroids.dtype == torch.int8
    # key and value centroids of one item
    tile_bytes = 2 * math.prod(key_centroids.shape[2:]) * key_centroids.element_size()
    # columns of a dot; with 16 it is asynchronous and a tile more is held
    block_group = max(8, triton.next_power_of_2(workspace.gqa_group_size))
    tiles = config.coarse_num_stages - 1 + (block_group > 8)
    num_stages = config.coarse_num_stages if tiles * tile_bytes <= _MAX_TILE_BYTES else 1
    if eight_bits:
        key_centroids = key_centroids.view(torch.int16)
        value_centroids = value_centroids.view(torch.int16)
    _coarse_attention_kernel[(workspace.num_chunks(num_rows) * workspace.num_kv_heads,)](
        q_ptr=q,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        key_centroids_ptr=key_centroids,
        value_centroids_ptr=value_centroids,
        key_scale_ptr=pool_layer.key_scale,
        value_scale_ptr=pool_layer.value_scale,
        cluster_sizes_ptr=pool_layer.cluster_sizes,
        key_variance_ptr=pool_layer.key_variance,
        pair_weight_ptr=pool_layer.pair_weight,
        item_place_ptr=plan.item_place,
        exact_slots_ptr=plan.exact_slots,
        chunk_row_ptr=workspace.chunk_row,
        chunk_is_exact_ptr=workspace.chunk_is_exact,
        chunk_begin_ptr=workspace.chunk_begin,
        chunk_end_ptr=workspace.chunk_end,
        chunk_indptr_ptr=workspace.chunk_indptr,
        cluster_weight_ptr=workspace.cluster_weight,
        weight_shift_ptr=workspace.weight_shift_log2,
        logit_spread_ptr=workspace.logit_spread,
        part_max_ptr=workspace.part_max_log2,
        part_sum_ptr=workspace.part_sum,
        part_acc_ptr=workspace.part_acc,
        num_rows=num_rows,
        sm_scale=sm_scale,
        max_logit_variance=max_logit_variance,
        tail_bound=tail_bound(workspace, max_logit_variance),
        stride_q_row=q.stride(0),
        stride_slot=k_cache.stride(0),
        NUM_KV_HEADS=workspace.num_kv_heads,
        GROUP=workspace.gqa_group_size,
        HEAD_DIM=workspace.head_dim,
        CLUSTERS=workspace.clusters_per_segment,
        BLOCK_GROUP=block_group,
        BLOCK_D=triton.next_power_of_2(workspace.head_dim),
        BLOCK_TOKENS=config.coarse_block_tokens,
        EIGHT_BITS=eight_bits,
        IS_INT8=is_int8,
        UNPACK_SCALE=256.0 if eight_bits and not is_int8 else 1.0,
        OVERLAP=config.overlap_launches,
        num_warps=config.coarse_num_warps,
        num_stages=num_stages,
        maxnreg=config.coarse_max_registers,
        launch_pdl=config.overlap_launches,
    )
