"""What the last block of a (row, KV head) does: merge the parts, write the output, count."""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.attention_state import merge_parts


@triton.jit
def write_output(
    row,
    head,
    num_parts,
    out_ptr,  # [GROUP, HEAD_DIM], at the row and KV head
    coarse_max_ptr,  # [num_rows, NUM_KV_HEADS, GROUP] fp32
    coarse_sum_ptr,
    coarse_acc_ptr,  # [num_rows, NUM_KV_HEADS, GROUP, HEAD_DIM] fp32
    part_max_ptr,  # [num_parts, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [num_parts, GROUP, HEAD_DIM] fp32
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """Add the parts to the coarse state in order, and write its attention; 0 if there is none."""
    # [MERGE_GROUP, BLOCK_D]
    offs_head = tl.arange(0, MERGE_GROUP)
    offs_dim = tl.arange(0, BLOCK_D)
    # int64: rows * heads * head_dim
    row_head = (row * NUM_KV_HEADS + head).to(tl.int64)
    offs_coarse = row_head * GROUP + offs_head
    offs_out = offs_head[:, None] * HEAD_DIM + offs_dim[None, :]
    mask_head = offs_head < GROUP
    mask_out = mask_head[:, None] & (offs_dim < HEAD_DIM)[None, :]
    _, merged_sum, merged_acc = merge_parts(
        tl.load(coarse_max_ptr + offs_coarse, mask=mask_head, other=float("-inf")),
        tl.load(coarse_sum_ptr + offs_coarse, mask=mask_head, other=0.0),
        tl.load(coarse_acc_ptr + row_head * GROUP * HEAD_DIM + offs_out, mask=mask_out, other=0.0),
        part_max_ptr,
        part_sum_ptr,
        part_acc_ptr,
        0,
        num_parts,
        GROUP,
        GROUP,
        HEAD_DIM,
        MERGE_GROUP,
        BLOCK_D,
        PARTS_AT_ONCE,
    )
    out = merged_acc / tl.where(merged_sum > 0.0, merged_sum, 1.0)[:, None]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def count_step(
    row,
    counters_ptr,  # [num_rows, 4] int64, see multipole_decode
    item_indptr_ptr,  # [num_rows + 1]
    exact_indptr_ptr,  # [num_rows + 1]
    num_selected_tokens_ptr,  # [num_rows, NUM_KV_HEADS]
    num_clustered_tokens_ptr,  # [num_rows, NUM_KV_HEADS]
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Add a layer's step to the row's counters."""
    num_items = tl.load(item_indptr_ptr + row + 1) - tl.load(item_indptr_ptr + row)
    exact = tl.load(exact_indptr_ptr + row + 1) - tl.load(exact_indptr_ptr + row)
    offs_kv_head = tl.arange(0, BLOCK_HEADS)
    selected = tl.load(
        num_selected_tokens_ptr + row * NUM_KV_HEADS + offs_kv_head,
        mask=offs_kv_head < NUM_KV_HEADS,
        other=0,
    )
    mean_selected = tl.sum(selected, 0) // NUM_KV_HEADS
    clustered = tl.load(num_clustered_tokens_ptr + row * NUM_KV_HEADS)
    row_ptr = counters_ptr + row * 4
    if num_items > 0:
        tl.store(row_ptr, tl.load(row_ptr) + 1)
    elif exact > 0:
        tl.store(row_ptr + 1, tl.load(row_ptr + 1) + 1)
    tl.store(row_ptr + 2, tl.load(row_ptr + 2) + exact + mean_selected)
    tl.store(row_ptr + 3, tl.load(row_ptr + 3) + exact + clustered)
