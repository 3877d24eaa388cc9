"""Find each row's segments in the cluster pool and lay out a decode step's work, on the device.

Runs once a step, outside the graph, in three launches:

    find    one program per (row, segment): the place that holds exactly the row's slots, or none
    count   one program per row: its items and its always-exact tokens
    fill    one program per (row, segment): the item, and the slots that no cluster stands for

A row without usable clusters (below the gate, a budget that covers it, no room for its items) has
no items and all its tokens are exact. A row of padding (seq_len 0) has neither. The rules are those
of ClusterPool.find and docs/architecture.md.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from multipole_kernels.decode_buffers import DecodePlan


@dataclasses.dataclass(frozen=True)
class PoolIndex:
    """The tables by which segments are found; shapes in docs/architecture.md."""

    segment_slots: torch.Tensor  # [P, S] int32
    segment_slot_generation: torch.Tensor  # [P, S] int32
    segment_extent: torch.Tensor  # [P] int32
    last_used: torch.Tensor  # [P] int64
    segment_of_slot: torch.Tensor  # [num_slots] int32
    slot_generation: torch.Tensor  # [num_slots] int32
    open_place: torch.Tensor  # [num_rows] int32


@triton.jit
def _clustered_tokens(seq_len, min_context, recluster_interval):
    clustered = tl.maximum(seq_len // recluster_interval - 1, 0) * recluster_interval
    return tl.where(seq_len < min_context, 0, clustered)


@triton.jit
def _find_kernel(
    req_to_token_ptr,  # [num_rows of the table, >= context] int32
    rows_ptr,  # [num_rows] int64
    seq_lens_ptr,  # [num_rows] int64
    segment_slots_ptr,
    segment_slot_generation_ptr,
    segment_extent_ptr,
    last_used_ptr,
    segment_of_slot_ptr,
    slot_generation_ptr,
    open_place_ptr,
    found_place_ptr,  # [num_rows, max_segments] int32
    found_extent_ptr,  # [num_rows, max_segments] int32
    step,
    min_context,
    recluster_interval,
    max_segments,
    stride_table_row,
    SEGMENT_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    index, segment = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + index).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + index).to(tl.int32)
    clustered = _clustered_tokens(seq_len, min_context, recluster_interval)
    wanted = tl.minimum(clustered - segment * SEGMENT_SIZE, SEGMENT_SIZE)
    place = 0
    extent = 0
    if wanted > 0:
        slots_ptr = req_to_token_ptr + row * stride_table_row + segment * SEGMENT_SIZE
        if wanted == SEGMENT_SIZE:
            # one slot belongs to one prefix, so the last token's slot names a sealed segment
            last_slot = tl.load(slots_ptr + SEGMENT_SIZE - 1).to(tl.int64)
            place = tl.load(segment_of_slot_ptr + last_slot)
        else:
            place = tl.load(open_place_ptr + row)
        extent = tl.load(segment_extent_ptr + place)
        # an open place that reaches further than this row may is another request's
        usable = (place > 0) & (extent > 0) & (extent <= wanted)
        if wanted == SEGMENT_SIZE:
            usable = usable & (extent == SEGMENT_SIZE)
        mismatches = 0
        base = place.to(tl.int64) * SEGMENT_SIZE
        for begin in range(0, SEGMENT_SIZE, BLOCK_TOKENS):
            # [BLOCK_TOKENS]
            offs = begin + tl.arange(0, BLOCK_TOKENS)
            mask = usable & (offs < extent)
            slots = tl.load(slots_ptr + offs, mask=mask, other=0).to(tl.int64)
            known_slots = tl.load(segment_slots_ptr + base + offs, mask=mask, other=0)
            generation = tl.load(slot_generation_ptr + slots, mask=mask, other=0)
            known = tl.load(segment_slot_generation_ptr + base + offs, mask=mask, other=0)
            differs = mask & ((slots != known_slots) | (generation != known))
            mismatches += tl.sum(differs.to(tl.int32), 0)
        found = usable & (mismatches == 0)
        place = tl.where(found, place, 0)
        extent = tl.where(found, extent, 0)
        tl.store(last_used_ptr + place, step, mask=found)
    tl.store(found_place_ptr + index * max_segments + segment, place)
    tl.store(found_extent_ptr + index * max_segments + segment, extent)


@triton.jit
def _count_kernel(
    seq_lens_ptr,
    token_budget_ptr,  # [num_rows] int32
    found_extent_ptr,
    row_items_ptr,  # [num_rows] int32
    row_exact_ptr,  # [num_rows] int32
    min_context,
    recluster_interval,
    max_segments,
    NUM_SINKS: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    index = tl.program_id(0)
    seq_len = tl.load(seq_lens_ptr + index).to(tl.int32)
    clustered = _clustered_tokens(seq_len, min_context, recluster_interval)
    # [BLOCK_SEGMENTS]
    offs = tl.arange(0, BLOCK_SEGMENTS)
    extent = tl.load(
        found_extent_ptr + index * max_segments + offs, mask=offs < max_segments, other=0
    )
    # a budget that covers every clustered token makes the row one exact range
    is_sparse = tl.load(token_budget_ptr + index) < clustered
    extent = tl.where(is_sparse, extent, 0)
    in_clusters = extent - tl.where((offs == 0) & (extent > 0), NUM_SINKS, 0)
    tl.store(row_items_ptr + index, tl.sum((extent > 0).to(tl.int32), 0))
    tl.store(row_exact_ptr + index, seq_len - tl.sum(in_clusters, 0))


@triton.jit
def _fill_kernel(
    req_to_token_ptr,
    rows_ptr,
    seq_lens_ptr,
    found_place_ptr,
    found_extent_ptr,
    row_items_ptr,
    row_exact_ptr,
    item_indptr_ptr,
    item_place_ptr,
    exact_indptr_ptr,
    exact_slots_ptr,
    num_rows,
    max_items,
    max_segments,
    stride_table_row,
    NUM_SINKS: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    index, segment = tl.program_id(0), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + index).to(tl.int32)
    # [BLOCK_ROWS]
    offs_row = tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < num_rows
    items = tl.load(row_items_ptr + offs_row, mask=mask_row, other=0)
    exact = tl.load(row_exact_ptr + offs_row, mask=mask_row, other=0)
    lengths = tl.load(seq_lens_ptr + offs_row, mask=mask_row, other=0).to(tl.int32)
    # rows that the buffer of items has no room for are exact
    fits = tl.cumsum(items, 0) <= max_items
    exact = tl.where(fits, exact, lengths)
    items = tl.where(fits, items, 0)
    item_begin = tl.sum(tl.where(offs_row < index, items, 0), 0)
    exact_begin = tl.sum(tl.where(offs_row < index, exact, 0), 0)
    is_sparse = tl.sum(tl.where(offs_row == index, items, 0), 0) > 0
    if segment == 0:
        tl.store(item_indptr_ptr + index, item_begin)
        tl.store(exact_indptr_ptr + index, exact_begin)
        if index == num_rows - 1:
            tl.store(item_indptr_ptr + num_rows, tl.sum(items, 0))
            tl.store(exact_indptr_ptr + num_rows, tl.sum(exact, 0))

    begin = segment * SEGMENT_SIZE
    if begin < seq_len:
        # [BLOCK_SEGMENTS] of this row
        offs = tl.arange(0, BLOCK_SEGMENTS)
        extents = tl.load(
            found_extent_ptr + index * max_segments + offs, mask=offs < max_segments, other=0
        )
        extents = tl.where(is_sparse, extents, 0)
        in_clusters = extents - tl.where((offs == 0) & (extents > 0), NUM_SINKS, 0)
        tokens = tl.minimum(tl.maximum(seq_len - offs * SEGMENT_SIZE, 0), SEGMENT_SIZE)
        before = tl.sum(tl.where(offs < segment, tokens - in_clusters, 0), 0)
        items_before = tl.sum(((offs < segment) & (extents > 0)).to(tl.int32), 0)
        extent = tl.sum(tl.where(offs == segment, extents, 0), 0)
        if extent > 0:
            place = tl.load(found_place_ptr + index * max_segments + segment)
            tl.store(item_place_ptr + item_begin + items_before, place)

        row = tl.load(rows_ptr + index).to(tl.int64)
        num_sinks = tl.where((segment == 0) & (extent > 0), NUM_SINKS, 0)
        out_ptr = exact_slots_ptr + (exact_begin + before).to(tl.int64)
        for block in range(0, SEGMENT_SIZE, BLOCK_TOKENS):
            # [BLOCK_TOKENS]
            offset = block + tl.arange(0, BLOCK_TOKENS)
            is_sink = offset < num_sinks
            is_exact = (begin + offset < seq_len) & (is_sink | (offset >= extent))
            slots = tl.load(
                req_to_token_ptr + row * stride_table_row + begin + offset, mask=is_exact, other=0
            )
            rank = tl.where(is_sink, offset, num_sinks + offset - extent)
            tl.store(out_ptr + rank, slots, mask=is_exact)


class SegmentSnapshot:
    """The snapshot's buffers; every launch is on the current stream and waits for nothing.

    Attributes:
        found_extent: [max_rows, max_segments] int32, tokens under usable clusters.
        plan: the step's DecodePlan, its buffers fixed.
    """

    def __init__(
        self, max_rows: int, max_segments: int, max_items: int, max_exact: int, device: torch.device
    ):
        """
        Args:
            max_segments: segments of the longest row. max_items: usable segments of a batch.
            max_exact: always-exact tokens of a batch; all its tokens, since all may be exact.
        """
        self.max_rows, self.max_segments, self.max_items = max_rows, max_segments, max_items

        def new(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.found_place = new(max_rows, max_segments)
        self.found_extent = new(max_rows, max_segments)
        self.row_items, self.row_exact = new(max_rows), new(max_rows)
        self.plan = DecodePlan(
            item_indptr=new(max_rows + 1),
            item_place=new(max_items),
            exact_indptr=new(max_rows + 1),
            exact_slots=new(max_exact),
            token_budget=new(max_rows),
        )

    @property
    def nbytes(self) -> int:
        own = [self.found_place, self.found_extent, self.row_items, self.row_exact]
        return sum(tensor.nbytes for tensor in (*own, *vars(self.plan).values()))

    def take(
        self,
        index: PoolIndex,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        step: int,
        *,
        min_context: int,
        recluster_interval: int,
        num_sink_tokens: int,
    ) -> None:
        """Fill found_extent and plan; plan.token_budget is read, and must be filled before.

        Args:
            req_to_token: [table rows, context] int32. rows: [B] int64, rows of the table.
            seq_lens: [B] int64 or int32, the new token included; 0 for a row of padding.
        """
        num_rows, segment_size = rows.shape[0], index.segment_slots.shape[1]
        if num_rows > self.max_rows:
            raise ValueError(
                f"SegmentSnapshot: at most {self.max_rows} rows fit its buffers, got {num_rows}"
            )
        if num_rows == 0:
            return
        blocks = {
            "SEGMENT_SIZE": segment_size,
            "BLOCK_TOKENS": min(1024, triton.next_power_of_2(segment_size)),
        }
        block_segments = triton.next_power_of_2(self.max_segments)
        _find_kernel[(num_rows, self.max_segments)](
            req_to_token_ptr=req_to_token,
            rows_ptr=rows,
            seq_lens_ptr=seq_lens,
            segment_slots_ptr=index.segment_slots,
            segment_slot_generation_ptr=index.segment_slot_generation,
            segment_extent_ptr=index.segment_extent,
            last_used_ptr=index.last_used,
            segment_of_slot_ptr=index.segment_of_slot,
            slot_generation_ptr=index.slot_generation,
            open_place_ptr=index.open_place,
            found_place_ptr=self.found_place,
            found_extent_ptr=self.found_extent,
            step=step,
            min_context=min_context,
            recluster_interval=recluster_interval,
            max_segments=self.max_segments,
            stride_table_row=req_to_token.stride(0),
            num_warps=4,
            **blocks,
        )
        _count_kernel[(num_rows,)](
            seq_lens_ptr=seq_lens,
            token_budget_ptr=self.plan.token_budget,
            found_extent_ptr=self.found_extent,
            row_items_ptr=self.row_items,
            row_exact_ptr=self.row_exact,
            min_context=min_context,
            recluster_interval=recluster_interval,
            max_segments=self.max_segments,
            NUM_SINKS=num_sink_tokens,
            BLOCK_SEGMENTS=block_segments,
            num_warps=4,
        )
        _fill_kernel[(num_rows, self.max_segments)](
            req_to_token_ptr=req_to_token,
            rows_ptr=rows,
            seq_lens_ptr=seq_lens,
            found_place_ptr=self.found_place,
            found_extent_ptr=self.found_extent,
            row_items_ptr=self.row_items,
            row_exact_ptr=self.row_exact,
            item_indptr_ptr=self.plan.item_indptr,
            item_place_ptr=self.plan.item_place,
            exact_indptr_ptr=self.plan.exact_indptr,
            exact_slots_ptr=self.plan.exact_slots,
            num_rows=num_rows,
            max_items=self.max_items,
            max_segments=self.max_segments,
            stride_table_row=req_to_token.stride(0),
            NUM_SINKS=num_sink_tokens,
            BLOCK_ROWS=triton.next_power_of_2(self.max_rows),
            BLOCK_SEGMENTS=block_segments,
            num_warps=4,
            **blocks,
        )
