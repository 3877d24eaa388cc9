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
    """[M] the integer m of a state once logits [M, N] are added."""
    return tl.maximum(max_log2, tl.ceil(tl.max(logits_log2, 1)))


@triton.jit
def tail_above_score(logit_variance, sizes, max_logit_variance):
    """[M, K] what a cluster's base-2 tail logit adds to its score; -inf for an empty cluster.

    logit_variance [M, K] in nats squared; sizes [K] in tokens.
    """
    capped = tl.minimum(logit_variance, max_logit_variance)
    return 0.5 * LOG2_E * capped + tl.log2(sizes.to(tl.float32))[None, :]


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

    The unrolled parts have no reduction across threads, so that their loads are all in flight.
    """
    offs_group = tl.arange(0, BLOCK_GROUP)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_group = offs_group < GROUP
    mask_dim = offs_dim < HEAD_DIM
    for first in range(begin, end, PARTS_AT_ONCE):
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
            new_max = tl.maximum(merged_max, part_max)
            shift = finite_or_zero(new_max)
            rescale = tl.exp2(merged_max - shift)
            weight = tl.exp2(part_max - shift)
            merged_sum = merged_sum * rescale + part_sum * weight
            acc = acc * rescale[:, None] + part_acc * weight[:, None]
            merged_max = new_max
    return merged_max, merged_sum, acc


@triton.jit
def add_to_state(max_log2, weight_sum, acc, logits_log2, values):
    """The state with logits [M, N] and values [N, D] added; a logit of -inf adds nothing."""
    new_max = raised_max(max_log2, logits_log2)
    shift = finite_or_zero(new_max)
    # [M, N]
    weight = tl.exp2(logits_log2 - shift[:, None])
    rescale = tl.exp2(max_log2 - shift)
    weight_sum = weight_sum * rescale + tl.sum(weight, 1)
    acc = acc * rescale[:, None] + dot(weight.to(values.dtype), values)
    return new_max, weight_sum, acc


@triton.jit
def attend_slots(
    max_log2,  # [M]
    weight_sum,  # [M]
    acc,  # [M, BLOCK_D]
    q,  # [M, BLOCK_D]
    slots_ptr,  # int32, KV slots
    begin,
    end,
    k_cache_ptr,  # at the KV head
    v_cache_ptr,
    stride_slot,  # elements from one slot to the next
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """The state with the tokens at slots_ptr[begin:end] added."""
    offs_token = tl.arange(0, BLOCK_TOKENS)
    offs_dim = tl.arange(0, BLOCK_D)
    mask_dim = offs_dim < HEAD_DIM
    for first in range(begin, end, BLOCK_TOKENS):
        mask_token = first + offs_token < end
        slot = tl.load(slots_ptr + first + offs_token, mask=mask_token, other=0)
        # int64: slots * KV heads * head_dim passes 2**31
        offset = slot.to(tl.int64) * stride_slot
        # [BLOCK_TOKENS, BLOCK_D]
        mask = mask_token[:, None] & mask_dim[None, :]
        offsets = offset[:, None] + offs_dim[None, :]
        keys = tl.load(k_cache_ptr + offsets, mask=mask, other=0.0)
        values = tl.load(v_cache_ptr + offsets, mask=mask, other=0.0)
        # [M, BLOCK_TOKENS]
        logits = dot(q, tl.trans(keys)) * scale_log2
        logits = tl.where(mask_token[None, :], logits, float("-inf"))
        max_log2, weight_sum, acc = add_to_state(max_log2, weight_sum, acc, logits, values)
    return max_log2, weight_sum, acc


def tail_bound(workspace: DecodeWorkspace, max_logit_variance: float) -> float:
    """The most that tail_above_score gives: a state's maximum needs no second look at the tails."""
    return 0.5 * max_logit_variance / math.log(2.0) + math.log2(workspace.max_cluster_size)
