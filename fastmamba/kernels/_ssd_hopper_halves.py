"""Arithmetic of the Hopper SSD on pairs of halves, bfloat16 or float16: one instruction for two numbers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _split(v, dtype: gl.constexpr):
    """A float32 as the sum of two numbers of half the width."""
    value = v.to(dtype)
    return value, (v - value.to(gl.float32)).to(dtype)


@gluon.jit
def _product(v, rest):
    """Two numbers of half precision at a time, rounded."""
    if v.dtype == gl.bfloat16:
        code: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;"
    else:
        code: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(code, "=r,r,r", [v, rest], dtype=v.dtype, is_pure=True, pack=2)


@gluon.jit
def _sum_of_products(v, value, rest):
    """v * value + rest, two at a time, rounded once: with `rest` from `_product` as if in float32 from start to end."""
    if v.dtype == gl.bfloat16:
        code: gl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
    else:
        code: gl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(code, "=r,r,r,r", [v, value, rest], dtype=v.dtype, is_pure=True, pack=2)


@gluon.jit
def _packed(xT):
    """Two neighbours of half precision as one int32, for a loop to carry: halves would take a register each."""
    low, high = xT.reshape([xT.shape[0], xT.shape[1] // 2, 2]).split()
    low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return low | (high.to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _halves(pairs, dtype: gl.constexpr):
    """Of what is `_packed`, the halves, in a layout that follows."""
    low = pairs.to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(low, high).reshape([pairs.shape[0], 2 * pairs.shape[1]])


@gluon.jit
def _unpacked(pairs, dtype: gl.constexpr, layout: gl.constexpr):
    """x^T again."""
    return gl.convert_layout(_halves(pairs, dtype), layout, assert_trivial=True)


@gluon.jit
def _rounded(v, dtype: gl.constexpr):
    """A float32 tensor in half precision, `_packed`."""
    low, high = v.reshape([v.shape[0], v.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        code: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        code: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(code, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _widen(xT):
    """x^T in float32; two bfloat16 of a register are told apart by an instruction each."""
    if xT.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;}", "=r,=r,r", [xT], dtype=gl.float32, is_pure=True, pack=2
        )
    else:
        return xT.to(gl.float32)


@gluon.jit
def _silu(z):
    """z / (1 + exp(-z)) in five instructions; exact division takes fifteen."""
    return gl.inline_asm_elementwise(
        "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e;}",
        "=r,r",
        [z],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
