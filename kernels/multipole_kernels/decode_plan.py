"""Cut a batch's work into chunks of about equal cost, on the device.

A chunk is a run of one row's tiles (of its segments' centroids) or of its always-exact tokens.
Blocks start in the chunks' order, as many at a time as fit the card, and take about as long as
their bytes. So the chunks of the longer kind come first, of all rows, the shorter ones fill the
places behind them, and the length is the one with which the last block is reckoned to end first. A
row without work gets no chunk. Runs once a step, outside the graph, for all layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace

# a block's start, in exact tokens' bytes; from times by length of chunk
# (benchmarks/results/coarse_chunks_h200.csv, decode_plans_h100.csv)
_START_COST = 32
# longest chunk that is looked at, in exact tokens' bytes
_MAX_COST = 2048
# rows times lengths that are looked at together
_MAX_ELEMENTS = 2048


@triton.jit
def _exact_per_chunk(tiles, TILE_COST: tl.constexpr, EXACT_UNIT: tl.constexpr):
    """Exact tokens that cost as much as tiles, in whole units."""
    return tl.maximum(tl.cdiv(tiles * TILE_COST, EXACT_UNIT), 1) * EXACT_UNIT


@triton.jit
def _cut(amounts, most):
    """Chunks into which amounts [rows, ...] are cut if each is at most `most`; the longest one."""
    chunks = tl.cdiv(amounts, most)
    return tl.sum(chunks, 0), tl.max(tl.cdiv(amounts, tl.maximum(chunks, 1)), 0)


@triton.jit
def _end(num_long, long, num_short, short, wave_chunks):
    """When the last block ends: waves of the longer kind, then what of the others found no place
    beside the last of them; few of those are left, and then blocks run about twice as fast.

    long, short: cost of a chunk, its start included.
    """
    waves = tl.cdiv(num_long, wave_chunks)
    beside = (waves * wave_chunks - num_long) * (long // short)
    behind = tl.maximum(num_short - beside, 0)
    return waves * long + tl.cdiv(behind, wave_chunks) * short // 2


@triton.jit
def _best_length(
    tiles,  # [rows]
    exact,  # [rows]
    least,  # tiles of a chunk
    wave_chunks,
    TILE_COST: tl.constexpr,
    START_COST: tl.constexpr,
    MAX_TILES: tl.constexpr,
    EXACT_UNIT: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Tiles of a chunk with which the last block ends first, from least to MAX_TILES."""
    NUMBERS: tl.constexpr = 1 << 20  # above every candidate
    most = tl.maximum(least, MAX_TILES)
    best = tl.full([], 1 << 62, tl.int64)
    for first in range(least, most + 1, CANDIDATES):
        candidate = first + tl.arange(0, CANDIDATES)
        num_tile, tile = _cut(tiles[:, None], candidate[None, :])
        exact_per_chunk = _exact_per_chunk(candidate, TILE_COST, EXACT_UNIT)
        num_exact, exact_tokens = _cut(exact[:, None], exact_per_chunk[None, :])
        tile_cost = tile * TILE_COST + START_COST
        exact_cost = exact_tokens + START_COST
        end = tl.where(
            tile_cost >= exact_cost,
            _end(num_tile, tile_cost, num_exact, exact_cost, wave_chunks),
            _end(num_exact, exact_cost, num_tile, tile_cost, wave_chunks),
        )
        # the shorter one of two that end together
        order = tl.where(candidate <= most, end.to(tl.int64) * NUMBERS + candidate, 1 << 62)
        best = tl.minimum(best, tl.min(order, 0))
    return (best % NUMBERS).to(tl.int32)


@triton.jit
def _plan_chunks_kernel(
    item_indptr_ptr,  # [num_rows + 1]
    exact_indptr_ptr,  # [num_rows + 1]
    chunk_row_ptr,  # [max_chunks]
    chunk_is_exact_ptr,
    chunk_begin_ptr,
    chunk_end_ptr,
    chunk_part_ptr,
    chunk_indptr_ptr,  # [num_rows + 1]
    num_rows,
    wave_chunks,
    target_chunks,
    TILES: tl.constexpr,  # of an item
    TILE_COST: tl.constexpr,  # cost of a tile in exact tokens
    START_COST: tl.constexpr,  # of a block, in exact tokens
    MAX_TILES: tl.constexpr,  # tiles of the longest chunk that is looked at
    EXACT_UNIT: tl.constexpr,  # tokens that a block gathers at a time
    CANDIDATES: tl.constexpr,  # lengths looked at together
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """One program writes one row's chunks; each sums the whole batch's cost again."""
    row = tl.program_id(0)
    offs_row = tl.arange(0, BLOCK_ROWS)
    mask_row = offs_row < num_rows
    # [BLOCK_ROWS]
    items = tl.load(item_indptr_ptr + offs_row + 1, mask=mask_row, other=0) - tl.load(
        item_indptr_ptr + offs_row, mask=mask_row, other=0
    )
    tiles = items * TILES
    exact = tl.load(exact_indptr_ptr + offs_row + 1, mask=mask_row, other=0) - tl.load(
        exact_indptr_ptr + offs_row, mask=mask_row, other=0
    )
    cost = tl.sum(tiles, 0) * TILE_COST + tl.sum(exact, 0)
    # no more chunks than there is room for
    least = tl.maximum(tl.cdiv(tl.cdiv(cost, target_chunks), TILE_COST), 1)
    tiles_per_chunk = _best_length(
        tiles, exact, least, wave_chunks, TILE_COST, START_COST, MAX_TILES, EXACT_UNIT, CANDIDATES
    )
    exact_per_chunk = _exact_per_chunk(tiles_per_chunk, TILE_COST, EXACT_UNIT)
    chunks_of_tiles, chunks_of_exact = (
        tl.cdiv(tiles, tiles_per_chunk),
        tl.cdiv(exact, exact_per_chunk),
    )
    all_tile_chunks, longest = _cut(tiles, tiles_per_chunk)
    all_exact_chunks, longest_exact = _cut(exact, exact_per_chunk)
    tiles_first = longest * TILE_COST >= longest_exact
    tile_chunks_before = tl.sum(tl.where(offs_row < row, chunks_of_tiles, 0), 0)
    exact_chunks_before = tl.sum(tl.where(offs_row < row, chunks_of_exact, 0), 0)
    first_part = tile_chunks_before + exact_chunks_before
    tl.store(chunk_indptr_ptr + row, first_part)
    if row == num_rows - 1:
        tl.store(chunk_indptr_ptr + num_rows, all_tile_chunks + all_exact_chunks)

    tile_begin = tl.load(item_indptr_ptr + row) * TILES
    tile_end = tl.load(item_indptr_ptr + row + 1) * TILES
    exact_begin = tl.load(exact_indptr_ptr + row)
    exact_end = tl.load(exact_indptr_ptr + row + 1)
    num_tiles = tile_end - tile_begin
    num_exact = exact_end - exact_begin
    tile_chunks = tl.cdiv(num_tiles, tiles_per_chunk)
    exact_chunks = tl.cdiv(num_exact, exact_per_chunk)
    num_chunks = tile_chunks + exact_chunks
    for chunk in range(0, num_chunks, BLOCK_CHUNKS):
        # [BLOCK_CHUNKS]
        offs = chunk + tl.arange(0, BLOCK_CHUNKS)
        is_exact = offs >= tile_chunks
        nth = tl.where(is_exact, offs - tile_chunks, offs)
        # a row's chunks of a kind differ by one at most
        of_row = tl.where(is_exact, num_exact, num_tiles)
        parts = tl.maximum(tl.where(is_exact, exact_chunks, tile_chunks), 1)
        first = tl.where(is_exact, exact_begin, tile_begin)
        begin = first + nth * of_row // parts
        end = first + (nth + 1) * of_row // parts
        mask = offs < num_chunks
        first_of_kind = tl.where(
            is_exact,
            exact_chunks_before + tl.where(tiles_first, all_tile_chunks, 0),
            tile_chunks_before + tl.where(tiles_first, 0, all_exact_chunks),
        )
        place = first_of_kind + nth
        tl.store(chunk_row_ptr + place, row, mask=mask)
        tl.store(chunk_is_exact_ptr + place, is_exact.to(tl.int32), mask=mask)
        tl.store(chunk_begin_ptr + place, begin, mask=mask)
        tl.store(chunk_end_ptr + place, end, mask=mask)
        tl.store(chunk_part_ptr + place, first_part + offs, mask=mask)


def plan_chunks(
    plan: DecodePlan, workspace: DecodeWorkspace, num_rows: int, centroid_bytes: int = 2
) -> None:
    """Fill the workspace's chunks from the plan's row pointers.

    Args:
        num_rows: rows of the batch as the graph was captured, padding rows included.
        centroid_bytes: bytes of one centroid element, for the cost of a tile.
    """
    if not 1 <= num_rows <= workspace.max_rows:
        raise ValueError(
            f"plan_chunks: num_rows must be between 1 and {workspace.max_rows}, got {num_rows}"
        )
    # few shapes to compile
    block_rows = max(16, triton.next_power_of_2(num_rows))
    # keys and values are two bytes an element
    tile_cost = max(1, workspace.tile_clusters * centroid_bytes // 2)
    _plan_chunks_kernel[(num_rows,)](
        item_indptr_ptr=plan.item_indptr,
        exact_indptr_ptr=plan.exact_indptr,
        chunk_row_ptr=workspace.chunk_row,
        chunk_is_exact_ptr=workspace.chunk_is_exact,
        chunk_begin_ptr=workspace.chunk_begin,
        chunk_end_ptr=workspace.chunk_end,
        chunk_part_ptr=workspace.chunk_part,
        chunk_indptr_ptr=workspace.chunk_indptr,
        num_rows=num_rows,
        wave_chunks=workspace.wave_chunks(centroid_bytes),
        target_chunks=workspace.target_chunks(num_rows),
        TILES=workspace.tiles_per_segment,
        TILE_COST=tile_cost,
        START_COST=_START_COST,
        MAX_TILES=max(1, _MAX_COST // tile_cost),
        EXACT_UNIT=workspace.config.coarse_block_tokens,
        CANDIDATES=min(64, max(1, _MAX_ELEMENTS // block_rows)),
        BLOCK_ROWS=block_rows,
        BLOCK_CHUNKS=128,
        num_warps=4,
    )
