"""Cut a batch's work into chunks of about equal cost, on the device.

A chunk is a run of one row's tiles (of its segments' centroids) or of its always-exact tokens. All
chunks run at once if they can be short enough to be worth it; with more work they are of a length
beside which a block's start does not show. A row without work gets no chunk. Runs once a step,
outside the graph, for all layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.decode_buffers import DecodePlan, DecodeWorkspace

# cost of a chunk in exact tokens, between which it is chosen; measured on an H100
_MIN_COST, _MAX_COST = 32, 512


@triton.jit
def _exact_per_chunk(tiles, TILE_COST: tl.constexpr, EXACT_UNIT: tl.constexpr):
    """Exact tokens that cost as much as tiles, in whole units."""
    return tl.maximum(tl.cdiv(tiles * TILE_COST, EXACT_UNIT), 1) * EXACT_UNIT


@triton.jit
def _plan_chunks_kernel(
    item_indptr_ptr,  # [num_rows + 1]
    exact_indptr_ptr,  # [num_rows + 1]
    chunk_row_ptr,  # [max_chunks]
    chunk_is_exact_ptr,
    chunk_begin_ptr,
    chunk_end_ptr,
    chunk_indptr_ptr,  # [num_rows + 1]
    num_rows,
    wave_chunks,
    target_chunks,
    TILES: tl.constexpr,  # of an item
    TILE_COST: tl.constexpr,  # cost of a tile in exact tokens
    MIN_TILES: tl.constexpr,  # tiles that a block's start is worth
    MAX_TILES: tl.constexpr,  # tiles beside which a block's start does not show
    EXACT_UNIT: tl.constexpr,  # tokens that a block gathers at a time
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
    # the shortest chunks that all run at once; if none do, the longest: they balance themselves
    tiles_per_chunk = tl.maximum(tl.cdiv(tl.cdiv(cost, target_chunks), TILE_COST), MIN_TILES)
    found = tiles_per_chunk >= MAX_TILES
    for candidate in tl.static_range(MIN_TILES, MAX_TILES):
        chunks = tl.cdiv(tiles, candidate)
        chunks += tl.cdiv(exact, _exact_per_chunk(candidate, TILE_COST, EXACT_UNIT))
        fits = (candidate >= tiles_per_chunk) & (tl.sum(chunks, 0) <= wave_chunks)
        tiles_per_chunk = tl.where(fits & ~found, candidate, tiles_per_chunk)
        found = found | fits
    tiles_per_chunk = tl.where(found, tiles_per_chunk, MAX_TILES)
    exact_per_chunk = _exact_per_chunk(tiles_per_chunk, TILE_COST, EXACT_UNIT)
    chunks = tl.cdiv(tiles, tiles_per_chunk) + tl.cdiv(exact, exact_per_chunk)
    first_chunk = tl.sum(tl.where(offs_row < row, chunks, 0), 0)
    tl.store(chunk_indptr_ptr + row, first_chunk)
    if row == num_rows - 1:
        tl.store(chunk_indptr_ptr + num_rows, tl.sum(chunks, 0))

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
        tl.store(chunk_row_ptr + first_chunk + offs, row, mask=mask)
        tl.store(chunk_is_exact_ptr + first_chunk + offs, is_exact.to(tl.int32), mask=mask)
        tl.store(chunk_begin_ptr + first_chunk + offs, begin, mask=mask)
        tl.store(chunk_end_ptr + first_chunk + offs, end, mask=mask)


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
    # keys and values are two bytes an element
    tile_cost = max(1, workspace.tile_clusters * centroid_bytes // 2)
    min_tiles = triton.cdiv(_MIN_COST, tile_cost)
    _plan_chunks_kernel[(num_rows,)](
        item_indptr_ptr=plan.item_indptr,
        exact_indptr_ptr=plan.exact_indptr,
        chunk_row_ptr=workspace.chunk_row,
        chunk_is_exact_ptr=workspace.chunk_is_exact,
        chunk_begin_ptr=workspace.chunk_begin,
        chunk_end_ptr=workspace.chunk_end,
        chunk_indptr_ptr=workspace.chunk_indptr,
        num_rows=num_rows,
        wave_chunks=workspace.wave_chunks(centroid_bytes),
        target_chunks=workspace.target_chunks(num_rows),
        TILES=workspace.tiles_per_segment,
        TILE_COST=tile_cost,
        MIN_TILES=min_tiles,
        MAX_TILES=max(min_tiles, _MAX_COST // tile_cost),
        EXACT_UNIT=workspace.config.coarse_block_tokens,
        BLOCK_ROWS=triton.next_power_of_2(workspace.max_rows),
        BLOCK_CHUNKS=128,
        num_warps=4,
    )
