"""Cluster selection: each KV head's best clusters, whole, up to a token budget.

    rank(cluster) = sum over the query heads g of exp(score_g - lse_g)

lse_g is the log of the full denominator. Clusters are taken best first (a tie takes the lower
index) while their sizes sum to at most the budget; the first that does not fit ends the list; the
best is always taken unless the budget is 0 (reference.cluster_selection).

cluster_rank computes the ranks, cluster_search the threshold. A row of up to `select_segments`
segments is held in registers, a longer one is read again in every trial.

The same launch merges the coarse parts, on multiprocessors that the selection leaves free if there
are any. A row without items selects nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from multipole_kernels.attention_state import merge_parts
from multipole_kernels.cluster_search import select_resident, select_streamed
from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace, PoolLayer


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
        num_clusters, num_clustered_tokens = select_resident(
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
        num_clusters, num_clustered_tokens = select_streamed(
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
        num_clusters, num_clustered_tokens = select_resident(
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
