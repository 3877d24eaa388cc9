"""Attention states inside the kernels, and the one loop that attends to KV slots.

A state is (max_log2, sum, acc): an integer m at or just above the largest base-2 logit x seen, and
the sums of 2^(x - m) and of 2^(x - m) * value. Unlike (out, lse) it can be subtracted: a part added
before is taken out with its weights negated. As m is an integer, a weight rounds to the same digits
whatever m is, so what is taken out is what was put in, also after its rounding to the model's
dtype. (-inf, 0, 0) has attended to nothing.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from multipole_kernels.decode_buffers import DecodeWorkspace

LOG2_E = tl.constexpr(1.4426950408889634)
# by which the float16 product of a weight, at most 1, and an 8-bit value's scale is raised: values
# of up to 8,000 fit, and the weights of values of 0.005 keep their precision. A power of two, so
# that a weight rounds to the same digits whatever a state's maximum is
VALUE_FACTOR = tl.constexpr(1024.0)
# the interpreter multiplies bfloat16 matrices as the integers it keeps them in
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """[M, N] float32 product of two blocks of one 16-bit dtype."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def finite_or_zero(x):
    """The shift of an exponent: 0 for -inf, because -inf - (-inf) is NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def raised_max(max_log2, logits_log2):
    """[M] the integer m of a state once logits [N, M] are added."""
    return tl.maximum(max_log2, tl.ceil(tl.max(logits_log2, 0)))


@triton.jit
def tail_above_score(logit_variance, sizes, max_logit_variance):
    """What a cluster's base-2 tail logit adds to its score; -inf for an empty cluster.

    logit_variance in nats squared, sizes in tokens; they broadcast.
    """
    capped = tl.minimum(logit_variance, max_logit_variance)
    return 0.5 * LOG2_E * capped + tl.log2(sizes.to(tl.float32))


@triton.jit
def merge_parts(
    merged_max,  # [BLOCK_GROUP]
    merged_sum,
    acc,  # [BLOCK_GROUP, BLOCK_D]
    part_max_ptr,  # [parts, GROUP] fp32
    part_sum_ptr,
    part_acc_ptr,  # [parts, GROUP, HEAD_DIM] fp32
    begin,
    end,
    stride_part,  # query heads from one part to the next
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
):
    """The state of a KV head's query heads with parts begin to end added, in order.

    The largest maximum comes first, so that no part waits for the one before it.
    """
    offs_group = tl.arange(0, BLOCK_GROUP)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_group = offs_group < GROUP
    mask_dim = offs_dim < HEAD_DIM
    for first in range(begin, end, PARTS_AT_ONCE):
        new_max = merged_max
        for nth in tl.static_range(PARTS_AT_ONCE):
            part = first + nth
            head = part * stride_part + offs_group
            mask = mask_group & (part < end)
            part_max = tl.load(part_max_ptr + head, mask=mask, other=float("-inf"))
            new_max = tl.maximum(new_max, part_max)
        shift = finite_or_zero(new_max)
        rescale = tl.exp2(merged_max - shift)
        merged_sum *= rescale
        acc *= rescale[:, None]
        merged_max = new_max
        for nth in tl.static_range(PARTS_AT_ONCE):
            part = first + nth
            # int64: parts * heads * head_dim
            head = part * stride_part + offs_group.to(tl.int64)
            mask = mask_group & (part < end)
            part_max = tl.load(part_max_ptr + head, mask=mask, other=float("-inf"))
            part_sum = tl.load(part_sum_ptr + head, mask=mask, other=0.0)
            part_acc = tl.load(
                part_acc_ptr + head[:, None] * HEAD_DIM + offs_dim[None, :],
                mask=mask[:, None] & mask_dim[None, :],
                other=0.0,
            )
            weight = tl.exp2(part_max - shift)
            merged_sum += part_sum * weight
            acc += part_acc * weight[:, None]
    return merged_max, merged_sum, acc


@triton.jit
def add_to_state(max_log2, weight_sum, acc, logits_log2, values):
    """The state with logits [N, M] and values [D, N] added; a logit of -inf adds nothing."""
    new_max = raised_max(max_log2, logits_log2)
    shift = finite_or_zero(new_max)
    # [N, M]
    weight = tl.exp2(logits_log2 - shift[None, :])
    rescale = tl.exp2(max_log2 - shift)
    weight_sum = weight_sum * rescale + tl.sum(weight, 0)
    acc = acc * rescale[None, :] + dot(values, weight.to(values.dtype))
    return new_max, weight_sum, acc


@triton.jit
def attend_slots(
    max_log2,  # [M]
    weight_sum,  # [M]
    acc,  # [BLOCK_D, M]
    q,  # [BLOCK_D, M]
    slots_ptr,  # int32, KV slots
    begin,
    end,
    step,  # from one tile to the next, at least BLOCK_TOKENS
    slot,  # [BLOCK_TOKENS] the first tile's
    k_cache_ptr,  # at the KV head
    v_cache_ptr,
    stride_slot,  # elements from one slot to the next
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The state with tiles of the tokens at slots_ptr[begin:end] added, one every step."""
    offs_token = tl.arange(0, BLOCK_TOKENS)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_dim = offs_dim < HEAD_DIM
    # a tile's slots are loaded while the one before it is attended to
    for first in range(begin, end, step):
        mask_token = first + offs_token < end
        # int64: slots * KV heads * head_dim passes 2**31
        offset = slot.to(tl.int64) * stride_slot
        # [BLOCK_TOKENS, BLOCK_D] and [BLOCK_D, BLOCK_TOKENS]
        keys = tl.load(
            k_cache_ptr + offset[:, None] + offs_dim[None, :],
            mask=mask_token[:, None] & mask_dim[None, :],
            other=0.0,
        )
        values = tl.load(
            v_cache_ptr + offset[None, :] + offs_dim[:, None],
            mask=mask_token[None, :] & mask_dim[:, None],
            other=0.0,
        )
        next_token = first + step + offs_token
        slot = tl.load(slots_ptr + next_token, mask=next_token < end, other=0)
        # [BLOCK_TOKENS, M]
        logits = dot(keys, q) * scale_log2
        logits = tl.where(mask_token[:, None], logits, float("-inf"))
        max_log2, weight_sum, acc = add_to_state(max_log2, weight_sum, acc, logits, values)
    return max_log2, weight_sum, acc


def tail_bound(workspace: DecodeWorkspace, max_logit_variance: float) -> float:
    """The most that tail_above_score gives: a state's maximum needs no second look at the tails."""
    return 0.5 * max_logit_variance / math.log(2.0) + math.log2(workspace.max_cluster_size)
