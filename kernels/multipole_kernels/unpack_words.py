"""8-bit centroids as float16 operands of a product, from 16-bit words of two dimensions each."""

from __future__ import annotations

import triton
import triton.language as tl

# the interpreter knows no machine instructions
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# two int16 words in, their low and their high bytes out as two float16 each
_UNPACK_INT8 = tl.constexpr("""{
    .reg .b32 words, low, high, bias;
    xor.b32 words, $2, 0x80808080;
    prmt.b32 low, words, 0x64646464, 0x4240;
    prmt.b32 high, words, 0x64646464, 0x4341;
    mov.b32 bias, 0x64806480;
    sub.f16x2 $0, low, bias;
    sub.f16x2 $1, high, bias;
}""")
_UNPACK_FLOAT8 = tl.constexpr("""{
    .reg .b32 sign, rest;
    shl.b32 sign, $2, 8;
    and.b32 sign, sign, 0x80008000;
    shl.b32 rest, $2, 7;
    and.b32 rest, rest, 0x3F803F80;
    or.b32 $0, sign, rest;
    and.b32 sign, $2, 0x80008000;
    shr.b32 rest, $2, 1;
    and.b32 rest, rest, 0x3F803F80;
    or.b32 $1, sign, rest;
}""")


@triton.jit
def unpack_words(words, IS_INT8: tl.constexpr):
    """The low and high bytes of int16 words as float16, without a conversion instruction.

    An int8 b: b ^ 0x80 is b + 128, and 0x6400 | n is the float16 1024 + n. A float8 e4m3: its bits
    moved to float16's places give the number divided by 2^8, subnormals included; the caller
    multiplies by UNPACK_SCALE. (Converting would also make the compiler read the transposed values
    byte by byte from shared memory.)
    """
    if _INTERPRETED:
        if IS_INT8:
            low = ((words & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
            high = (((words >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        else:
            shifted = words << 8
            low = ((shifted & -32768) | ((shifted & 0x7F00) >> 1)).to(tl.float16, bitcast=True)
            high = ((words & -32768) | ((words & 0x7F00) >> 1)).to(tl.float16, bitcast=True)
        return low, high
    return tl.inline_asm_elementwise(
        _UNPACK_INT8 if IS_INT8 else _UNPACK_FLOAT8,
        "=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
