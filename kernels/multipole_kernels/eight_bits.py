"""Rounding of float32 to 8 bits inside a kernel, e4m3 also on GPUs that cannot convert to it."""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: added to a number below 2^22, it leaves the number rounded (half to even) in the bits
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def rounded(x):
    """int32, x rounded half to even; |x| below 2^22."""
    return (x + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def float8_bits(x):
    """int32 in 0 to 255, the bits of x as float8 e4m3fn, rounded half to even; |x| at most 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 3 of 23 bits of mantissa stay, and an exponent's bias of 7 instead of 127
    half_to_even = 0x7FFFF + ((magnitude >> 20) & 1)
    normal = ((magnitude + half_to_even) >> 20) - (120 << 3)
    # below 2^-6 the bits are a multiple of 2^-9
    subnormal = rounded(tl.abs(x) * 512.0)
    is_normal = magnitude >= 0x3C800000
    return tl.where(is_normal, normal, subnormal) | ((bits >> 24) & 0x80)
