"""Coarse attention: every cluster by its centroid, every always-exact token as it is.

For each item (a usable segment of a row) and KV head, in one pass over both centroids:

    score = q . key_centroid * sm_scale
    tail  = score + min(|q * sm_scale|^2 * key_variance, max_logit_variance) / 2 + log(size)
    state += exp(tail) * value_centroid                      (reference.centroid_attention)

The selection that follows needs the full denominator, which this pass alone can give; it therefore
attends to all clusters, and the third launch takes the selected ones out again. What it keeps of
the scores is exp(score - the segment's largest score) in float16: a rounding of 2^-11 of the
cluster's own weight, at a quarter of the traffic of float32 scores written and read.

An empty cluster (size 0) has weight 0. A chunk without work leaves at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attention_state import (
    LOG2_E,
    add_to_state,
    attend_slots,
    dot,
    finite_or_zero,
    raised_max,
)
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer


@triton.jit
def _coarse_attention_kernel(
    q_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_slots, NUM_KV_HEADS, HEAD_DIM]
    v_cache_ptr,
    key_centroids_ptr,  # [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM]
    value_centroids_ptr,
    key_scale_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32, with 8-bit centroids
    value_scale_ptr,
    cluster_sizes_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] int16
    key_variance_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32
    item_place_ptr,  # [max_items]
    exact_slots_ptr,  # [max_exact]
    chunk_row_ptr,  # [max_chunks]
    chunk_is_exact_ptr,
    chunk_begin_ptr,
    chunk_end_ptr,
    chunk_indptr_ptr,  # [num_rows + 1]
    cluster_weight_ptr,  # [max_items, NUM_KV_HEADS, GROUP, CLUSTERS] fp16
    weight_shift_ptr,  # [max_items, NUM_KV_HEADS, GROUP] fp32
    part_max_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [max_chunks, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    num_rows,
    sm_scale,
    max_logit_variance,
    stride_q_row,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program takes one chunk of one KV head."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    if chunk >= tl.load(chunk_indptr_ptr + num_rows):
        return
    row = tl.load(chunk_row_ptr + chunk).to(tl.int64)
    begin = tl.load(chunk_begin_ptr + chunk)
    end = tl.load(chunk_end_ptr + chunk)

    offs_group = tl.arange(0, BLOCK_GROUP)
    mask_group = offs_group < GROUP
    offs_dim = tl.arange(0, BLOCK_D)
    mask_dim = offs_dim < HEAD_DIM
    # [BLOCK_GROUP, BLOCK_D]
    q = tl.load(
        q_ptr + row * stride_q_row + (head * GROUP + offs_group[:, None]) * HEAD_DIM + offs_dim,
        mask=mask_group[:, None] & mask_dim[None, :],
        other=0.0,
    )
    max_log2 = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_D], tl.float32)
    scale_log2 = sm_scale * LOG2_E

    if tl.load(chunk_is_exact_ptr + chunk) != 0:
        max_log2, weight_sum, acc = attend_slots(
            max_log2,
            weight_sum,
            acc,
            q,
            exact_slots_ptr,
            begin,
            end,
            k_cache_ptr + head * HEAD_DIM,
            v_cache_ptr + head * HEAD_DIM,
            stride_slot,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_TOKENS,
        )
    else:
        offs_cluster = tl.arange(0, CLUSTERS)
        # [BLOCK_GROUP] variance of the logits per unit of key variance
        q_square = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * sm_scale * sm_scale
        if HAS_SCALE:
            # 8-bit numbers are exact in float16, and so is all of q that matters
            q_scored = q.to(tl.float32).to(tl.float16)
        else:
            q_scored = q
        for item in range(begin, end):
            place = tl.load(item_place_ptr + item).to(tl.int64)
            cluster = (place * NUM_KV_HEADS + head) * CLUSTERS + offs_cluster
            # [CLUSTERS, BLOCK_D]
            offsets = cluster[:, None] * HEAD_DIM + offs_dim[None, :]
            keys = tl.load(key_centroids_ptr + offsets, mask=mask_dim[None, :], other=0.0)
            values = tl.load(value_centroids_ptr + offsets, mask=mask_dim[None, :], other=0.0)
            # [CLUSTERS]
            sizes = tl.load(cluster_sizes_ptr + cluster).to(tl.float32)
            variance = tl.load(key_variance_ptr + cluster)
            if HAS_SCALE:
                keys = keys.to(tl.float16)
                values = values.to(tl.float16)
            # [BLOCK_GROUP, CLUSTERS]
            scores = dot(q_scored, tl.trans(keys)) * scale_log2
            if HAS_SCALE:
                scores *= tl.load(key_scale_ptr + cluster)[None, :]
            scores = tl.where(sizes[None, :] > 0.0, scores, float("-inf"))

            # [BLOCK_GROUP]
            weight_shift = finite_or_zero(tl.max(scores, 1))
            cluster_weight = tl.exp2(scores - weight_shift[:, None]).to(tl.float16)
            offs_item = (item * NUM_KV_HEADS + head) * GROUP + offs_group.to(tl.int64)
            tl.store(weight_shift_ptr + offs_item, weight_shift, mask=mask_group)
            tl.store(
                cluster_weight_ptr + offs_item[:, None] * CLUSTERS + offs_cluster[None, :],
                cluster_weight,
                mask=mask_group[:, None],
            )

            logit_variance = tl.minimum(q_square[:, None] * variance[None, :], max_logit_variance)
            # from the rounded weight: what is taken out later is what is put in here
            tail = tl.log2(cluster_weight.to(tl.float32)) + weight_shift[:, None]
            tail += 0.5 * LOG2_E * logit_variance + tl.log2(sizes)[None, :]
            if HAS_SCALE:
                value_scale = tl.load(value_scale_ptr + cluster)
                max_log2, weight_sum, acc = _add_scaled(
                    max_log2, weight_sum, acc, tail, values, value_scale
                )
            else:
                max_log2, weight_sum, acc = add_to_state(max_log2, weight_sum, acc, tail, values)

    # int64: chunks * heads * head_dim
    offs_part = (chunk.to(tl.int64) * NUM_KV_HEADS + head) * GROUP + offs_group
    tl.store(part_max_ptr + offs_part, max_log2, mask=mask_group)
    tl.store(part_sum_ptr + offs_part, weight_sum, mask=mask_group)
    tl.store(
        part_acc_ptr + offs_part[:, None] * HEAD_DIM + offs_dim[None, :],
        acc,
        mask=mask_group[:, None] & mask_dim[None, :],
    )


@triton.jit
def _add_scaled(max_log2, weight_sum, acc, logits_log2, values, value_scale):
    """add_to_state for values that are to be multiplied by value_scale [N]."""
    new_max = raised_max(max_log2, logits_log2)
    shift = finite_or_zero(new_max)
    weight = tl.exp2(logits_log2 - shift[:, None])
    rescale = tl.exp2(max_log2 - shift)
    weight_sum = weight_sum * rescale + tl.sum(weight, 1)
    # scales relative to the largest, so that weights keep float16's precision
    largest = tl.maximum(tl.max(value_scale, 0), 1e-30)
    weight *= (value_scale / largest)[None, :]
    acc = acc * rescale[:, None] + dot(weight.to(values.dtype), values) * largest
    return new_max, weight_sum, acc


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
    has_scale = pool_layer.key_scale is not None
    _coarse_attention_kernel[(workspace.num_chunks(num_rows) * workspace.num_kv_heads,)](
        q_ptr=q,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        key_centroids_ptr=pool_layer.key_centroids,
        value_centroids_ptr=pool_layer.value_centroids,
        key_scale_ptr=pool_layer.key_scale,
        value_scale_ptr=pool_layer.value_scale,
        cluster_sizes_ptr=pool_layer.cluster_sizes,
        key_variance_ptr=pool_layer.key_variance,
        item_place_ptr=plan.item_place,
        exact_slots_ptr=plan.exact_slots,
        chunk_row_ptr=workspace.chunk_row,
        chunk_is_exact_ptr=workspace.chunk_is_exact,
        chunk_begin_ptr=workspace.chunk_begin,
        chunk_end_ptr=workspace.chunk_end,
        chunk_indptr_ptr=workspace.chunk_indptr,
        cluster_weight_ptr=workspace.cluster_weight,
        weight_shift_ptr=workspace.weight_shift_log2,
        part_max_ptr=workspace.part_max_log2,
        part_sum_ptr=workspace.part_sum,
        part_acc_ptr=workspace.part_acc,
        num_rows=num_rows,
        sm_scale=sm_scale,
        max_logit_variance=max_logit_variance,
        stride_q_row=q.stride(0),
        stride_slot=k_cache.stride(0),
        NUM_KV_HEADS=workspace.num_kv_heads,
        GROUP=workspace.gqa_group_size,
        HEAD_DIM=workspace.head_dim,
        CLUSTERS=workspace.clusters_per_segment,
        BLOCK_GROUP=16,  # tl.dot needs 16 rows
        BLOCK_D=triton.next_power_of_2(workspace.head_dim),
        BLOCK_TOKENS=config.coarse_block_tokens,
        HAS_SCALE=has_scale,
        OVERLAP=config.overlap_launches,
        num_warps=config.coarse_num_warps,
        num_stages=config.coarse_num_stages,
        launch_pdl=config.overlap_launches,
    )
