"""Query heads as the columns of a block.

Of the dimensions every STEP-th from `first`: all, or one of the two that share a 16-bit word.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_heads(
    ptr,
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """[BLOCK_DIMS, BLOCK_GROUP] of GROUP heads of DIMS * STEP dimensions; 0 beyond either."""
    offsets = _head_offsets(first, STEP, DIMS, BLOCK_GROUP, BLOCK_DIMS)
    return tl.load(ptr + offsets, mask=_head_mask(GROUP, DIMS, BLOCK_GROUP, BLOCK_DIMS), other=0.0)


@triton.jit
def store_heads(
    ptr,
    block,  # [BLOCK_DIMS, BLOCK_GROUP]
    first,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """The opposite of load_heads."""
    offsets = _head_offsets(first, STEP, DIMS, BLOCK_GROUP, BLOCK_DIMS)
    tl.store(ptr + offsets, block, mask=_head_mask(GROUP, DIMS, BLOCK_GROUP, BLOCK_DIMS))


@triton.jit
def _head_offsets(
    first,
    STEP: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    offs_group = tl.arange(0, BLOCK_GROUP)[None, :]
    offs_dim = tl.arange(0, BLOCK_DIMS)[:, None]
    return offs_group * (DIMS * STEP) + offs_dim * STEP + first


@triton.jit
def _head_mask(
    GROUP: tl.constexpr, DIMS: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIMS: tl.constexpr
):
    return (tl.arange(0, BLOCK_GROUP) < GROUP)[None, :] & (tl.arange(0, BLOCK_DIMS) < DIMS)[:, None]
