"""Coarse attention: every cluster by its centroid, every always-exact token as it is.

For each item (a usable segment of a row) and KV head, in one pass over both centroids, a tile of at
most 128 clusters at a time (attend_tiles):

    score = q . key_centroid * sm_scale
    spread = sum over f of pair_weight_f * (q_f^2 + q_(f + D/2)^2) * sm_scale^2, of the segment
    tail  = score + min(spread * key_variance, max_logit_variance) / 2 + log(size)
    state += exp(tail) * value_centroid                      (reference.centroid_attention)

The selection that follows needs the full denominator, which this pass alone can give; it therefore
attends to all clusters, and the third launch takes the selected ones out again. What it keeps of
the scores is exp(score - the tile's largest score) in float16: a rounding of 2^-11 of the
cluster's own weight, at a quarter of the traffic of float32 scores written and read.

An empty cluster (size 0) has weight 0. A chunk without work leaves at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attend_tiles import attend_tiles
from multipole_kernels.attention_state import LOG2_E, attend_slots, tail_bound
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.head_columns import load_heads, store_heads

# of the tiles that a block loads ahead, in shared memory
_MAX_TILE_BYTES = 192 * 1024


@triton.jit(do_not_specialize=["num_rows"])
def _coarse_attention_kernel(
    q_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_slots, NUM_KV_HEADS, HEAD_DIM]
    v_cache_ptr,
    key_centroids_ptr,  # [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM], float8 ones as int16 words
    value_centroids_ptr,  # the same, all 8-bit ones as int16 words
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
    chunk_part_ptr,
    chunk_indptr_ptr,  # [num_rows + 1]
    cluster_weight_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP, TILE_CLUSTERS] fp16
    weight_shift_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP] fp32
    logit_spread_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP] fp32
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
    TILE_CLUSTERS: tl.constexpr,
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
    part = tl.load(chunk_part_ptr + chunk).to(tl.int64)
    if chunk >= num_chunks:
        return

    q_ptr += row * stride_q_row + head * GROUP * HEAD_DIM
    # int64: parts * heads * head_dim
    part = (part * NUM_KV_HEADS + head) * GROUP
    part_acc_ptr += part * HEAD_DIM
    if is_exact != 0:
        q_heads = load_heads(q_ptr, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
        token = begin + tl.arange(0, BLOCK_TOKENS)
        max_log2, weight_sum, acc = attend_slots(
            tl.full([BLOCK_GROUP], float("-inf"), tl.float32),
            tl.zeros([BLOCK_GROUP], tl.float32),
            tl.zeros([BLOCK_D, BLOCK_GROUP], tl.float32),
            q_heads,
            exact_slots_ptr,
            begin,
            end,
            BLOCK_TOKENS,
            tl.load(exact_slots_ptr + token, mask=token < end, other=0),
            k_cache_ptr + head * HEAD_DIM,
            v_cache_ptr + head * HEAD_DIM,
            stride_slot,
            sm_scale * LOG2_E,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_TOKENS,
        )
        store_heads(part_acc_ptr, acc, 0, 1, GROUP, HEAD_DIM, BLOCK_GROUP, BLOCK_D)
    else:
        max_log2, weight_sum = attend_tiles(
            begin,
            end,
            head,
            q_ptr,
            part_acc_ptr,
            key_centroids_ptr,
            value_centroids_ptr,
            key_scale_ptr,
            value_scale_ptr,
            cluster_sizes_ptr,
            key_variance_ptr,
            pair_weight_ptr,
            item_place_ptr,
            cluster_weight_ptr,
            weight_shift_ptr,
            logit_spread_ptr,
            sm_scale,
            max_logit_variance,
            tail_bound,
            NUM_KV_HEADS,
            GROUP,
            HEAD_DIM,
            CLUSTERS,
            TILE_CLUSTERS,
            BLOCK_GROUP,
            BLOCK_D,
            EIGHT_BITS,
            IS_INT8,
            UNPACK_SCALE,
        )
    offs_group = tl.arange(0, BLOCK_GROUP)
    mask_group = offs_group < GROUP
    tl.store(part_max_ptr + part + offs_group, max_log2, mask=mask_group)
    tl.store(part_sum_ptr + part + offs_group, weight_sum, mask=mask_group)


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
    # key and value centroids of one tile
    tile_elements = workspace.tile_clusters * workspace.head_dim
    tile_bytes = 2 * tile_elements * key_centroids.element_size()
    # columns of a dot; with 16 it is asynchronous and a tile more is held
    block_group = max(8, triton.next_power_of_2(workspace.gqa_group_size))
    tiles = config.coarse_num_stages - 1 + (block_group > 8)
    num_stages = config.coarse_num_stages if tiles * tile_bytes <= _MAX_TILE_BYTES else 1
    if eight_bits:
        value_centroids = value_centroids.view(torch.int16)
        key_centroids = key_centroids if is_int8 else key_centroids.view(torch.int16)
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
        chunk_part_ptr=workspace.chunk_part,
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
        TILE_CLUSTERS=workspace.tile_clusters,
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
