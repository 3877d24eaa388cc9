"""What is clustered: the keys without their rotary position, less an offset, in float16.

    feature = (unrotate(key) - offset) * scale                         (reference.unrotate)

The offset is the mean of 64 of the unit's tokens at even distances, and the scale a power of two
that takes their largest magnitude to 8 at least and below 16. k-means sees neither: they keep the
digits of float16 for what differs between tokens. (reference.cluster_segment subtracts the mean of
all tokens.) What would overflow is clamped. Rows of features beyond an order's tokens, and columns
beyond head_dim, are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multipole_kernels.clustering_batch import (
    BLOCK_TOKENS,
    ClusteringBatch,
    load_order,
    load_pointer,
)

_NUM_SAMPLES = 64
_FEATURE_TOKENS = 16  # of a program that writes features
_LARGEST = tl.constexpr(65504.0)


@triton.jit
def _load_rotated(
    keys_ptr,  # of one head, [num_slots] rows of STRIDE_SLOT
    cos_ptr,  # [max_position, HALF] fp32; what is masked is not read
    sin_ptr,
    slots,
    positions,
    mask_token,
    has_rotary,
    STRIDE_SLOT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Both halves of the rotated dimensions with the rotation undone, [tokens, BLOCK_HALF] fp32."""
    offs_half = tl.arange(0, BLOCK_HALF)
    mask = mask_token[:, None] & (offs_half < HALF)[None, :]
    key_ptrs = keys_ptr + slots[:, None] * STRIDE_SLOT + offs_half[None, :]
    x = tl.load(key_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(key_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = positions[:, None] * HALF + offs_half[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask & has_rotary, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=mask & has_rotary, other=0.0)
    scale = 1.0 / (cos * cos + sin * sin)
    return (x * cos + y * sin) * scale, (y * cos - x * sin) * scale


@triton.jit
def _load_rest(
    keys_ptr,
    slots,
    mask_token,
    STRIDE_SLOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The dimensions without rotation, [tokens, BLOCK_DIM] fp32; 0 in the columns of the others."""
    offs_dim = tl.arange(0, BLOCK_DIM)
    mask = mask_token[:, None] & ((offs_dim >= 2 * HALF) & (offs_dim < HEAD_DIM))[None, :]
    key_ptrs = keys_ptr + slots[:, None] * STRIDE_SLOT + offs_dim[None, :]
    return tl.load(key_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_layers"])
def _offset_kernel(
    orders_ptr,
    layer_table_ptr,
    req_to_token_ptr,
    offset_ptr,  # [U, BLOCK_DIM] fp32
    scale_ptr,  # [U] fp32
    num_layers,
    stride_table_row,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    KV_DTYPE: tl.constexpr,
):
    """One program takes one unit."""
    unit = tl.program_id(0).to(tl.int64)
    head = unit % NUM_KV_HEADS
    pair = unit // NUM_KV_HEADS
    row, segment, _, num_sinks, num_tokens, _ = load_order(
        orders_ptr, pair // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    layer_ptr = layer_table_ptr + pair % num_layers * 4
    keys_ptr = load_pointer(layer_ptr, KV_DTYPE) + head * HEAD_DIM
    STRIDE_SLOT: tl.constexpr = NUM_KV_HEADS * HEAD_DIM

    offset_ptr += unit * BLOCK_DIM
    sample = tl.arange(0, NUM_SAMPLES)
    # [NUM_SAMPLES], with repetitions if there are fewer tokens
    positions = segment * SEGMENT_SIZE + num_sinks + sample * num_tokens // NUM_SAMPLES
    slots = tl.load(req_to_token_ptr + row * stride_table_row + positions).to(tl.int64)
    mask_token = sample < NUM_SAMPLES
    largest = 0.0
    if 2 * HALF < BLOCK_DIM:
        offs_dim = tl.arange(0, BLOCK_DIM)
        rest = _load_rest(keys_ptr, slots, mask_token, STRIDE_SLOT, HEAD_DIM, HALF, BLOCK_DIM)
        mean = tl.sum(rest, 0) / NUM_SAMPLES
        tl.store(offset_ptr + offs_dim, mean, mask=offs_dim >= 2 * HALF)
        largest = tl.max(tl.max(tl.abs(rest - mean[None, :]), 1), 0)
    if HALF > 0:
        x, y = _load_rotated(
            keys_ptr,
            load_pointer(layer_ptr + 2, tl.float32),
            load_pointer(layer_ptr + 3, tl.float32),
            slots,
            positions.to(tl.int64),
            mask_token,
            tl.load(layer_ptr + 2) != 0,
            STRIDE_SLOT,
            HALF,
            BLOCK_HALF,
        )
        offs_half = tl.arange(0, BLOCK_HALF)
        mean_x, mean_y = tl.sum(x, 0) / NUM_SAMPLES, tl.sum(y, 0) / NUM_SAMPLES
        tl.store(offset_ptr + offs_half, mean_x, mask=offs_half < HALF)
        tl.store(offset_ptr + HALF + offs_half, mean_y, mask=offs_half < HALF)
        largest_x = tl.max(tl.max(tl.abs(x - mean_x[None, :]), 1), 0)
        largest_y = tl.max(tl.max(tl.abs(y - mean_y[None, :]), 1), 0)
        largest = tl.maximum(largest, tl.maximum(largest_x, largest_y))
    # 2^e <= largest < 2^(e + 1): the scale is 2^(3 - e), of a biased exponent of 257 - (e + 127)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    # as if tokens that are all but equal had a magnitude of 2^-63
    biased = tl.minimum(tl.maximum(257 - exponent, 1), 257 - 64)
    tl.store(scale_ptr + unit, (biased << 23).to(tl.float32, bitcast=True))


@triton.jit
def _to_feature(x, offset_ptr, offs, mask_offs, mask_token, scale, LARGEST: tl.constexpr):
    offset = tl.load(offset_ptr + offs, mask=mask_offs, other=0.0)
    feature = tl.where(mask_token[:, None], (x - offset[None, :]) * scale, 0.0)
    return tl.minimum(tl.maximum(feature, -LARGEST), LARGEST).to(tl.float16)


@triton.jit(do_not_specialize=["num_layers", "padded_tokens"])
def _feature_kernel(
    orders_ptr,
    layer_table_ptr,
    req_to_token_ptr,
    offset_ptr,  # [U, BLOCK_DIM] fp32
    scale_ptr,  # [U] fp32
    features_ptr,  # [U, padded_tokens, BLOCK_DIM] fp16
    num_layers,
    padded_tokens,
    stride_table_row,
    NUM_KV_HEADS: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    TOKENS_PER_CLUSTER: tl.constexpr,
    SEGMENT_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    KV_DTYPE: tl.constexpr,
):
    """One program takes some tokens of one (order, layer), all heads: they share the angles."""
    pair = tl.program_id(0).to(tl.int64)
    row, segment, _, num_sinks, num_tokens, _ = load_order(
        orders_ptr, pair // num_layers, NUM_SINKS, TOKENS_PER_CLUSTER
    )
    begin = tl.program_id(1) * BLOCK_TOKENS
    # k-means reads whole tiles, whose last rows must be numbers
    if begin >= (num_tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS:
        return
    layer_ptr = layer_table_ptr + pair % num_layers * 4
    keys_ptr = load_pointer(layer_ptr, KV_DTYPE)
    STRIDE_SLOT: tl.constexpr = NUM_KV_HEADS * HEAD_DIM

    # [BLOCK_TOKENS]
    offs_token = begin + tl.arange(0, BLOCK_TOKENS)
    mask_token = offs_token < num_tokens
    positions = segment * SEGMENT_SIZE + num_sinks + offs_token
    slots = tl.load(
        req_to_token_ptr + row * stride_table_row + positions, mask=mask_token, other=0
    ).to(tl.int64)
    positions = positions.to(tl.int64)
    for head in range(NUM_KV_HEADS):
        unit = pair * NUM_KV_HEADS + head
        scale = tl.load(scale_ptr + unit)
        row_ptrs = features_ptr + (unit * padded_tokens + offs_token[:, None]) * BLOCK_DIM
        if HALF > 0:
            x, y = _load_rotated(
                keys_ptr + head * HEAD_DIM,
                load_pointer(layer_ptr + 2, tl.float32),
                load_pointer(layer_ptr + 3, tl.float32),
                slots,
                positions,
                mask_token,
                tl.load(layer_ptr + 2) != 0,
                STRIDE_SLOT,
                HALF,
                BLOCK_HALF,
            )
            offs_half = tl.arange(0, BLOCK_HALF)
            mask_half = offs_half < HALF
            unit_offset_ptr = offset_ptr + unit * BLOCK_DIM
            x = _to_feature(x, unit_offset_ptr, offs_half, mask_half, mask_token, scale, _LARGEST)
            y = _to_feature(
                y, unit_offset_ptr + HALF, offs_half, mask_half, mask_token, scale, _LARGEST
            )
            tl.store(row_ptrs + offs_half[None, :], x, mask=mask_half[None, :])
            tl.store(row_ptrs + HALF + offs_half[None, :], y, mask=mask_half[None, :])
        if 2 * HALF < BLOCK_DIM:
            offs_dim = tl.arange(0, BLOCK_DIM)
            rest = _load_rest(
                keys_ptr + head * HEAD_DIM,
                slots,
                mask_token,
                STRIDE_SLOT,
                HEAD_DIM,
                HALF,
                BLOCK_DIM,
            )
            mask_rest = offs_dim >= 2 * HALF
            rest = _to_feature(
                rest,
                offset_ptr + unit * BLOCK_DIM,
                offs_dim,
                mask_rest,
                mask_token,
                scale,
                _LARGEST,
            )
            tl.store(row_ptrs + offs_dim[None, :], rest, mask=mask_rest[None, :])


def write_features(batch: ClusteringBatch) -> None:
    """Fill batch.offset, batch.scale and batch.features [U, T, D] of the batch's orders."""
    geometry = batch.geometry
    rotary = {
        "HALF": geometry.rotary_half,
        "BLOCK_HALF": triton.next_power_of_2(max(geometry.rotary_half, 1)),
    }
    shared = batch.order_arguments() | batch.kv_arguments() | rotary
    _offset_kernel[(batch.num_units,)](
        offset_ptr=batch.offset,
        scale_ptr=batch.scale,
        NUM_SAMPLES=_NUM_SAMPLES,
        num_warps=4,
        **shared,
    )
    _feature_kernel[(batch.num_pairs, triton.cdiv(batch.padded_tokens, _FEATURE_TOKENS))](
        offset_ptr=batch.offset,
        scale_ptr=batch.scale,
        features_ptr=batch.features,
        padded_tokens=batch.padded_tokens,
        BLOCK_TOKENS=_FEATURE_TOKENS,
        TILE_TOKENS=BLOCK_TOKENS,
        num_warps=4,
        **shared,
    )
