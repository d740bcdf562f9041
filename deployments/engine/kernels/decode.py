"""Triton device functions: 32-bit words of a tile -> the matrix units' left operand, in registers.

The 4-bit lookup reads two weights at once from a table of all 256 pairs in shared memory. Each lane has its own copy,
at its own bank, so 32 lanes never wait for each other: 32 KiB. Triton has no such table, so it is inline PTX; with
`PTX` false the same values come from plain Triton, which its interpreter runs too.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are its own types.
from __future__ import annotations

import triton
import triton.language as tl

# The table outlives the braces that fill it: `look_up_pairs` names it. Entry b of a lane holds the weights of byte b,
# even column (high nibble) in the low half. Returns the lane's offset; whatever uses it comes after the barrier.
_FILL = """
.shared .align 128 .b8 headroom_pairs[32768];
{
.reg .b32 i, n, high, low, pair, at, base;
.reg .f32 even, odd;
.reg .b64 p;
.reg .pred more;
mov.u32 base, headroom_pairs;
mov.u32 i, %tid.x;
mov.u32 n, %ntid.x;
fill:
shr.u32 high, i, 9;
bfe.u32 low, i, 5, 4;
mad.wide.u32 p, high, 4, $1;
ld.global.f32 even, [p];
mad.wide.u32 p, low, 4, $1;
ld.global.f32 odd, [p];
cvt.rn.TYPEx2.f32 pair, odd, even;
mad.lo.u32 at, i, 4, base;
st.shared.b32 [at], pair;
add.u32 i, i, n;
setp.lt.u32 more, i, 8192;
@more bra fill;
bar.sync 0;
mov.u32 i, %laneid;
shl.b32 $0, i, 2;
}
"""
_LOOK_UP = """
{
.reg .b32 at, base, pair;
mov.u32 base, headroom_pairs;
shl.b32 at, $8, 7;
lop3.b32 at, at, 0x7F80, $9, 0xEA;
add.u32 at, at, base;
ld.shared.b32 pair, [at];
mov.b32 {$0, $1}, pair;
shr.u32 at, $8, 1;
lop3.b32 at, at, 0x7F80, $9, 0xEA;
add.u32 at, at, base;
ld.shared.b32 pair, [at];
mov.b32 {$2, $3}, pair;
shr.u32 at, $8, 9;
lop3.b32 at, at, 0x7F80, $9, 0xEA;
add.u32 at, at, base;
ld.shared.b32 pair, [at];
mov.b32 {$4, $5}, pair;
shr.u32 at, $8, 17;
lop3.b32 at, at, 0x7F80, $9, 0xEA;
add.u32 at, at, base;
ld.shared.b32 pair, [at];
mov.b32 {$6, $7}, pair;
}
"""
# v = (v & 127) - (v & 128), and 128 + (v & 127) and 128 + (v & 128) are bfloat16 numbers whose bits are 0x4300 | ...
_WIDEN_BF16 = """
{
.reg .b32 w, low, sign, one, pair;
mov.b32 one, 0x3F803F80;
mov.b32 w, $4;
lop3.b32 low, w, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, w, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 pair, low, one, sign;
mov.b32 {$0, $1}, pair;
shr.u32 w, w, 8;
lop3.b32 low, w, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, w, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 pair, low, one, sign;
mov.b32 {$2, $3}, pair;
}
"""
# 1024 + (v + 128) is a float16 number with the bits 0x6400 | (v ^ 128).
_WIDEN_FP16 = """
{
.reg .b32 w, biased, offset, pair;
mov.b32 offset, 0xE480E480;
mov.b32 w, $4;
lop3.b32 biased, w, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 pair, biased, offset;
mov.b32 {$0, $1}, pair;
shr.u32 w, w, 8;
lop3.b32 biased, w, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 pair, biased, offset;
mov.b32 {$2, $3}, pair;
}
"""
FILL_BF16 = tl.constexpr(_FILL.replace("TYPE", "bf16"))
FILL_FP16 = tl.constexpr(_FILL.replace("TYPE", "f16"))
LOOK_UP = tl.constexpr(_LOOK_UP)
WIDEN_BF16 = tl.constexpr(_WIDEN_BF16)
WIDEN_FP16 = tl.constexpr(_WIDEN_FP16)
BF16_FOUR, BF16_EIGHT = tl.constexpr((tl.bfloat16,) * 4), tl.constexpr((tl.bfloat16,) * 8)
FP16_FOUR, FP16_EIGHT = tl.constexpr((tl.float16,) * 4), tl.constexpr((tl.float16,) * 8)


@triton.jit
def fill_pairs(code, dtype: tl.constexpr, PTX: tl.constexpr):
    """Fill the table from `code` (16 float32). Once per program, before any `decode_4bit`."""
    if PTX:
        FILL: tl.constexpr = FILL_BF16 if dtype == tl.bfloat16 else FILL_FP16
        lane = tl.inline_asm_elementwise(
            FILL, "=r,l", [code.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        lane = 0
    return lane


@triton.jit
def _look_up(words, lane, code, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        pairs = tl.inline_asm_elementwise(
            LOOK_UP,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            [words, lane],
            dtype=BF16_EIGHT if dtype == tl.bfloat16 else FP16_EIGHT,
            is_pure=True,
            pack=1,
        )
    else:
        pairs = (
            tl.load(code + ((words >> 4) & 15)).to(dtype),
            tl.load(code + (words & 15)).to(dtype),
            tl.load(code + ((words >> 12) & 15)).to(dtype),
            tl.load(code + ((words >> 8) & 15)).to(dtype),
            tl.load(code + ((words >> 20) & 15)).to(dtype),
            tl.load(code + ((words >> 16) & 15)).to(dtype),
            tl.load(code + ((words >> 28) & 15)).to(dtype),
            tl.load(code + ((words >> 24) & 15)).to(dtype),
        )
    return pairs


@triton.jit
def decode_4bit(words, lane, code, dtype: tl.constexpr, STRIPS: tl.constexpr, PTX: tl.constexpr):
    """int32 [STRIPS, 128] -> dtype [16 * STRIPS, 64]: the table's values, unscaled."""
    words = tl.reshape(words, (STRIPS, 8, 4, 2, 2))  # strip, r, c, h, upper half of q
    e0, o0, e1, o1, e2, o2, e3, o3 = _look_up(words, lane, code, dtype, PTX)
    even = tl.join(tl.join(e0, o0), tl.join(e2, o2))
    odd = tl.join(tl.join(e1, o1), tl.join(e3, o3))
    pairs = tl.join(even, odd)  # strip, r, c, h, q // 4, j, q // 2 % 2, q % 2
    return tl.reshape(tl.permute(pairs, (0, 3, 1, 4, 6, 7, 2, 5)), (16 * STRIPS, 64))


@triton.jit
def _widen(words, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        WIDEN: tl.constexpr = WIDEN_BF16 if dtype == tl.bfloat16 else WIDEN_FP16
        values = tl.inline_asm_elementwise(
            WIDEN,
            "=h,=h,=h,=h,r",
            [words],
            dtype=BF16_FOUR if dtype == tl.bfloat16 else FP16_FOUR,
            is_pure=True,
            pack=1,
        )
    else:
        values = (
            ((words << 24) >> 24).to(dtype),
            ((words << 8) >> 24).to(dtype),
            ((words << 16) >> 24).to(dtype),
            (words >> 24).to(dtype),
        )
    return values


@triton.jit
def decode_8bit(words, dtype: tl.constexpr, STRIPS: tl.constexpr, PTX: tl.constexpr):
    """int32 [2 * STRIPS, 128] (all strips' first halves, then the second) -> dtype [16 * STRIPS, 64]."""
    words = tl.reshape(words, (2, STRIPS, 8, 4, 2, 2))  # p, strip, r, c, h, u
    e0, e1, o0, o1 = _widen(words, dtype, PTX)
    pairs = tl.join(tl.join(e0, e1), tl.join(o0, o1))  # ..., j, i
    return tl.reshape(tl.permute(pairs, (1, 4, 2, 0, 5, 7, 3, 6)), (16 * STRIPS, 64))
