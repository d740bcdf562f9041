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

# The table outlives the braces that fill it: `_LOOK_UP` names it. Entry b, 32 words for 32 lanes, holds the weights of
# byte b, that of the even column (high nibble) in the low half. Each thread writes four words at once; the 16 values
# come from the lanes, which hold one each. Returns the lane's offset; whatever uses it comes after the barrier.
_FILL = """
.shared .align 128 .b8 headroom_pairs[32768];
{
.reg .b32 i, n, high, low, pair, at, base, lane, mine, even, odd;
.reg .f32 e, o;
.reg .b64 p;
.reg .pred more;
mov.u32 base, headroom_pairs;
mov.u32 i, %tid.x;
mov.u32 n, %ntid.x;
mov.u32 lane, %laneid;
and.b32 low, lane, 15;
mad.wide.u32 p, low, 4, $1;
ld.global.b32 mine, [p];
fill:
shr.u32 high, i, 7;
bfe.u32 low, i, 3, 4;
shfl.sync.idx.b32 even, mine, high, 31, 0xffffffff;
shfl.sync.idx.b32 odd, mine, low, 31, 0xffffffff;
mov.b32 e, even;
mov.b32 o, odd;
cvt.rn.TYPEx2.f32 pair, o, e;
mad.lo.u32 at, i, 16, base;
st.shared.v4.b32 [at], {pair, pair, pair, pair};
add.u32 i, i, n;
setp.lt.u32 more, i, 2048;
@more bra fill;
bar.sync 0;
shl.b32 $0, lane, 2;
}
"""
_PAIR = """
lop3.b32 at, at, 0x7F80, $5, 0xEA;
add.u32 at, at, base;
ld.shared.b32 ${out}, [at];"""
_LOOK_UP = f"""
{{
.reg .b32 at, base;
mov.u32 base, headroom_pairs;
shl.b32 at, $4, 7;{_PAIR.format(out=0)}
shr.u32 at, $4, 1;{_PAIR.format(out=1)}
shr.u32 at, $4, 9;{_PAIR.format(out=2)}
shr.u32 at, $4, 17;{_PAIR.format(out=3)}
}}
"""
# v = (v & 127) - (v & 128), and 128 + (v & 127) and 128 + (v & 128) are bfloat16 numbers whose bits are 0x4300 | ...
_WIDEN_BF16 = """
{
.reg .b32 w, low, sign, one;
mov.b32 one, 0x3F803F80;
mov.b32 w, $2;
lop3.b32 low, w, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, w, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $0, low, one, sign;
shr.u32 w, w, 8;
lop3.b32 low, w, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 sign, w, 0x00800080, 0xC300C300, 0xEA;
fma.rn.bf16x2 $1, low, one, sign;
}
"""
# 1024 + (v + 128) is a float16 number with the bits 0x6400 | (v ^ 128).
_WIDEN_FP16 = """
{
.reg .b32 w, biased, offset;
mov.b32 offset, 0xE480E480;
mov.b32 w, $2;
lop3.b32 biased, w, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 $0, biased, offset;
shr.u32 w, w, 8;
lop3.b32 biased, w, 0x00FF00FF, 0x64806480, 0x6A;
add.rn.f16x2 $1, biased, offset;
}
"""
_SCALE = """
{
.reg .b32 s;
cvt.rn.TYPEx2.f32 s, $8, $8;
mul.rn.TYPEx2 $0, $4, s;
mul.rn.TYPEx2 $1, $5, s;
mul.rn.TYPEx2 $2, $6, s;
mul.rn.TYPEx2 $3, $7, s;
}
"""
SCALE_BF16 = tl.constexpr(_SCALE.replace("TYPE", "bf16"))
SCALE_FP16 = tl.constexpr(_SCALE.replace("TYPE", "f16"))
FILL_BF16 = tl.constexpr(_FILL.replace("TYPE", "bf16"))
FILL_FP16 = tl.constexpr(_FILL.replace("TYPE", "f16"))
LOOK_UP = tl.constexpr(_LOOK_UP)
WIDEN_BF16 = tl.constexpr(_WIDEN_BF16)
WIDEN_FP16 = tl.constexpr(_WIDEN_FP16)
BF16_TWO, FP16_TWO = tl.constexpr((tl.bfloat16,) * 2), tl.constexpr((tl.float16,) * 2)
INT32_TWO, INT32_FOUR = tl.constexpr((tl.int32,) * 2), tl.constexpr((tl.int32,) * 4)


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
def _halves(pair, dtype: tl.constexpr):
    """The low and the high half of 32 bits: no instruction, only names for the compiler."""
    return tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;",
        "=h,=h,r",
        [pair],
        dtype=BF16_TWO if dtype == tl.bfloat16 else FP16_TWO,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _look_up(words, lane, code, scale, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            LOOK_UP, "=r,=r,=r,=r,r,r", [words, lane], dtype=INT32_FOUR, is_pure=True, pack=1
        )
        if scale is not None:
            SCALE: tl.constexpr = SCALE_BF16 if dtype == tl.bfloat16 else SCALE_FP16
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                SCALE, "=r,=r,=r,=r,r,r,r,r,f", [p0, p1, p2, p3, scale], dtype=INT32_FOUR, is_pure=True, pack=1
            )
        e0, o0 = _halves(p0, dtype)
        e1, o1 = _halves(p1, dtype)
        e2, o2 = _halves(p2, dtype)
        e3, o3 = _halves(p3, dtype)
        pairs = (e0, o0, e1, o1, e2, o2, e3, o3)
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
        if scale is not None:
            s = scale.to(dtype)
            e0, o0, e1, o1, e2, o2, e3, o3 = pairs
            pairs = (e0 * s, o0 * s, e1 * s, o1 * s, e2 * s, o2 * s, e3 * s, o3 * s)
    return pairs


@triton.jit
def decode_4bit(words, lane, code, scale, dtype: tl.constexpr, STRIPS: tl.constexpr, PTX: tl.constexpr):
    """int32 [STRIPS, 128] -> dtype [16 * STRIPS, 64]: the table's values, times `scale` (float32 [16 * STRIPS]) unless
    it is None."""
    words = tl.reshape(words, (STRIPS, 8, 4, 2, 2))  # strip, r, c, h, upper half of q
    if scale is not None:
        scale = tl.permute(tl.reshape(scale, (STRIPS, 2, 8)), (0, 2, 1))[:, :, None, :, None]
        scale = tl.broadcast_to(scale, (STRIPS, 8, 4, 2, 2))
    e0, o0, e1, o1, e2, o2, e3, o3 = _look_up(words, lane, code, scale, dtype, PTX)
    even = tl.join(tl.join(e0, o0), tl.join(e2, o2))
    odd = tl.join(tl.join(e1, o1), tl.join(e3, o3))
    pairs = tl.join(even, odd)  # strip, r, c, h, q // 4, j, q // 2 % 2, q % 2
    return tl.reshape(tl.permute(pairs, (0, 3, 1, 4, 6, 7, 2, 5)), (16 * STRIPS, 64))


@triton.jit
def _widen(words, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        WIDEN: tl.constexpr = WIDEN_BF16 if dtype == tl.bfloat16 else WIDEN_FP16
        p0, p1 = tl.inline_asm_elementwise(WIDEN, "=r,=r,r", [words], dtype=INT32_TWO, is_pure=True, pack=1)
        e0, e1 = _halves(p0, dtype)
        o0, o1 = _halves(p1, dtype)
        values = (e0, e1, o0, o1)
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
