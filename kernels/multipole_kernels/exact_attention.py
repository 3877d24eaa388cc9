"""Exact attention to the selected clusters' tokens, in place of their centroids; then the merge.

    out = (coarse + sum over selected tokens - sum over selected centroids) / (the same of weights)

Each (row, KV head)'s slot list is cut over blocks that add its tokens (reference.exact_attention);
beside them a few blocks take the selected clusters' centroids out, with the weights that coarse
attention gave them. The last block to arrive merges the parts in order, so that the same input
gives the same bits, and writes the output: no fourth launch.

What is taken out of a selected cluster equals what coarse attention put in, rounding included
(attention_state). A row that attends to nothing gets 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attention_state import LOG2_E, attend_slots, tail_bound
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer
from multipole_kernels.step_output import count_step, write_output
from multipole_kernels.take_out_clusters import take_out_clusters


@triton.jit(do_not_specialize=["num_splits", "num_out_splits", "cluster_capacity", "slot_capacity"])
def _exact_attention_kernel(
    q_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
    k_cache_ptr,  # [num_slots, NUM_KV_HEADS, HEAD_DIM]
    v_cache_ptr,
    out_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM]
    value_centroids_ptr,  # [P, NUM_KV_HEADS, CLUSTERS, HEAD_DIM]
    value_scale_ptr,  # [P, NUM_KV_HEADS, CLUSTERS] fp32, with 8-bit centroids
    cluster_sizes_ptr,
    key_variance_ptr,
    item_indptr_ptr,  # [num_rows + 1]
    item_place_ptr,
    exact_indptr_ptr,  # [num_rows + 1]
    cluster_weight_ptr,  # [max_items * TILES, NUM_KV_HEADS, GROUP, TILE_CLUSTERS] fp16
    weight_shift_ptr,
    logit_spread_ptr,
    selected_clusters_ptr,  # [num_rows, NUM_KV_HEADS, cluster_capacity]
    selected_slots_ptr,  # [num_rows, NUM_KV_HEADS, slot_capacity]
    num_selected_clusters_ptr,  # [num_rows, NUM_KV_HEADS]
    num_selected_tokens_ptr,
    num_clustered_tokens_ptr,
    coarse_max_ptr,  # [num_rows, NUM_KV_HEADS, GROUP] fp32
    coarse_sum_ptr,
    coarse_acc_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    part_max_ptr,  # [num_rows, NUM_KV_HEADS, num_splits + num_out_splits, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [num_rows, NUM_KV_HEADS, num_splits + num_out_splits, GROUP, HEAD_DIM]
    num_arrived_ptr,  # [num_rows, NUM_KV_HEADS], 0 between launches
    counters_ptr,  # [num_rows, 4] int64
    num_splits,
    num_out_splits,
    cluster_capacity,
    slot_capacity,
    sm_scale,
    max_logit_variance,
    tail_bound,
    stride_q_row,
    stride_out_row,
    stride_slot,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
    TILE_CLUSTERS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CLUSTERS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    COUNT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program takes one split of one (row, KV head)'s tokens or clusters."""
    # the first blocks take tokens, the last num_out_splits take clusters out
    split = tl.program_id(0)
    row = tl.program_id(1) // NUM_KV_HEADS
    head = tl.program_id(1) % NUM_KV_HEADS
    row_head = tl.program_id(1).to(tl.int64)
    offs_group = tl.arange(0, BLOCK_GROUP)
    mask_group = offs_group < GROUP
    offs_dim = tl.arange(0, BLOCK_D)
    # a query head is a column
    mask_part = mask_group[None, :] & (offs_dim < HEAD_DIM)[:, None]
    # the query is older than the selection
    # [BLOCK_D, BLOCK_GROUP]
    q = tl.load(
        q_ptr
        + row.to(tl.int64) * stride_q_row
        + (head * GROUP + offs_group[None, :]) * HEAD_DIM
        + offs_dim[:, None],
        mask=mask_part,
        other=0.0,
    )
    item_begin = tl.load(item_indptr_ptr + row)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    num_tokens = tl.load(num_selected_tokens_ptr + row_head)
    num_clusters = tl.load(num_selected_clusters_ptr + row_head)
    # a block takes every num_splits-th tile, so that it can load its first slots or clusters before
    # it knows how many there are
    out_split = split - num_splits
    slots_ptr = selected_slots_ptr + row_head * slot_capacity
    clusters_ptr = selected_clusters_ptr + row_head * cluster_capacity
    offs_token = split * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_cluster = out_split * BLOCK_CLUSTERS + tl.arange(0, BLOCK_CLUSTERS)
    mask_token = (out_split < 0) & (offs_token < slot_capacity)
    mask_cluster = (offs_cluster >= 0) & (offs_cluster < cluster_capacity)
    first_slot = tl.load(slots_ptr + offs_token, mask=mask_token, other=0)
    first_cluster = tl.load(clusters_ptr + offs_cluster, mask=mask_cluster, other=0)
    token_parts = tl.minimum(tl.cdiv(num_tokens, BLOCK_TOKENS), num_splits)
    out_parts = tl.minimum(tl.cdiv(num_clusters, BLOCK_CLUSTERS), num_out_splits)
    num_parts = token_parts + out_parts
    # a row that selects nothing is written by its first block
    part = split
    if out_split >= 0:
        part = token_parts + out_split
        if out_split >= out_parts:
            return
    elif split >= tl.maximum(token_parts, 1):
        return

    # int64: rows * heads * splits * head_dim
    first_part = row_head * (num_splits + num_out_splits) * GROUP
    if num_parts > 0:
        max_log2 = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        weight_sum = tl.zeros([BLOCK_GROUP], tl.float32)
        acc = tl.zeros([BLOCK_D, BLOCK_GROUP], tl.float32)
        if out_split < 0:
            max_log2, weight_sum, acc = attend_slots(
                max_log2,
                weight_sum,
                acc,
                q,
                slots_ptr,
                split * BLOCK_TOKENS,
                num_tokens,
                num_splits * BLOCK_TOKENS,
                first_slot,
                k_cache_ptr + head * HEAD_DIM,
                v_cache_ptr + head * HEAD_DIM,
                stride_slot,
                sm_scale * LOG2_E,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_TOKENS,
            )
        else:
            max_log2, weight_sum, acc = take_out_clusters(
                max_log2,
                weight_sum,
                acc,
                clusters_ptr,
                out_split * BLOCK_CLUSTERS,
                num_clusters,
                num_out_splits * BLOCK_CLUSTERS,
                first_cluster,
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
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                CLUSTERS,
                TILE_CLUSTERS,
                BLOCK_GROUP,
                BLOCK_D,
                BLOCK_CLUSTERS,
                HAS_SCALE,
                q_ptr.dtype.element_ty,
            )
        offs_part = first_part + part * GROUP + offs_group
        tl.store(part_max_ptr + offs_part, max_log2, mask=mask_group)
        tl.store(part_sum_ptr + offs_part, weight_sum, mask=mask_group)
        tl.store(
            part_acc_ptr + offs_part[None, :] * HEAD_DIM + offs_dim[:, None], acc, mask=mask_part
        )
        # every thread's stores come before the arrival that announces them
        tl.debug_barrier()
        if tl.atomic_add(num_arrived_ptr + row_head, 1, sem="acq_rel") < num_parts - 1:
            return
        tl.debug_barrier()
        tl.store(num_arrived_ptr + row_head, 0)

    write_output(
        row,
        head,
        num_parts,
        out_ptr + row.to(tl.int64) * stride_out_row + head * GROUP * HEAD_DIM,
        coarse_max_ptr,
        coarse_sum_ptr,
        coarse_acc_ptr,
        part_max_ptr + first_part,
        part_sum_ptr + first_part,
        part_acc_ptr + first_part * HEAD_DIM,
        NUM_KV_HEADS,
        GROUP,
        HEAD_DIM,
        MERGE_GROUP,
        BLOCK_D,
        PARTS_AT_ONCE,
    )
    if COUNT and head == 0:
        count_step(
            row,
            counters_ptr,
            item_indptr_ptr,
            exact_indptr_ptr,
            num_selected_tokens_ptr,
            num_clustered_tokens_ptr,
            NUM_KV_HEADS,
            BLOCK_HEADS,
        )


def exact_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pool_layer: PoolLayer,
    plan: DecodePlan,
    workspace: DecodeWorkspace,
    sm_scale: float,
    max_logit_variance: float,
    out: torch.Tensor,
    counters: torch.Tensor | None = None,
) -> None:
    """Write the output [num_rows, num_q_heads, head_dim]; runs after cluster_selection.

    Args:
        counters: [at least num_rows, 4] int64, as multipole_decode describes them.
    """
    num_rows = q.shape[0]
    config = workspace.config
    num_splits = workspace.num_exact_splits(num_rows)
    num_out_splits = workspace.num_out_splits(num_rows)
    merge_group = triton.next_power_of_2(workspace.gqa_group_size)
    block_d = triton.next_power_of_2(workspace.head_dim)
    _exact_attention_kernel[(num_splits + num_out_splits, num_rows * workspace.num_kv_heads)](
        q_ptr=q,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        out_ptr=out,
        value_centroids_ptr=pool_layer.value_centroids,
        value_scale_ptr=pool_layer.value_scale,
        cluster_sizes_ptr=pool_layer.cluster_sizes,
        key_variance_ptr=pool_layer.key_variance,
        item_indptr_ptr=plan.item_indptr,
        item_place_ptr=plan.item_place,
        exact_indptr_ptr=plan.exact_indptr,
        cluster_weight_ptr=workspace.cluster_weight,
        weight_shift_ptr=workspace.weight_shift_log2,
        logit_spread_ptr=workspace.logit_spread,
        selected_clusters_ptr=workspace.selected_clusters,
        selected_slots_ptr=workspace.selected_slots,
        num_selected_clusters_ptr=workspace.num_selected_clusters,
        num_selected_tokens_ptr=workspace.num_selected_tokens,
        num_clustered_tokens_ptr=workspace.num_clustered_tokens,
        coarse_max_ptr=workspace.coarse_max_log2,
        coarse_sum_ptr=workspace.coarse_sum,
        coarse_acc_ptr=workspace.coarse_acc,
        part_max_ptr=workspace.exact_max_log2,
        part_sum_ptr=workspace.exact_sum,
        part_acc_ptr=workspace.exact_acc,
        num_arrived_ptr=workspace.num_arrived,
        counters_ptr=counters,
        num_splits=num_splits,
        num_out_splits=num_out_splits,
        sm_scale=sm_scale,
        max_logit_variance=max_logit_variance,
        tail_bound=tail_bound(workspace, max_logit_variance),
        stride_q_row=q.stride(0),
        stride_out_row=out.stride(0),
        stride_slot=k_cache.stride(0),
        NUM_KV_HEADS=workspace.num_kv_heads,
        GROUP=workspace.gqa_group_size,
        HEAD_DIM=workspace.head_dim,
        CLUSTERS=workspace.clusters_per_segment,
        TILE_CLUSTERS=workspace.tile_clusters,
        cluster_capacity=workspace.selected_clusters.shape[2],
        slot_capacity=workspace.selected_capacity,
        BLOCK_GROUP=max(8, merge_group),  # columns of a dot
        BLOCK_D=block_d,
        BLOCK_TOKENS=config.exact_block_tokens,
        BLOCK_CLUSTERS=32,
        BLOCK_HEADS=triton.next_power_of_2(workspace.num_kv_heads),
        MERGE_GROUP=merge_group,
        PARTS_AT_ONCE=config.merge_parts_at_once,
        HAS_SCALE=pool_layer.key_scale is not None,
        COUNT=counters is not None,
        OVERLAP=config.overlap_launches,
        num_warps=config.exact_num_warps,
        num_stages=config.exact_num_stages,
        maxnreg=config.exact_max_registers,
        launch_pdl=config.overlap_launches,
    )
