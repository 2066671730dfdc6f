"""The gate of a SwiGLU multilayer perceptron."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher, unit_stride
from fastmamba.kernels._silu import silu

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(
    x_ptr,
    y_ptr,
    T,
    size,
    blocks,
    stride_x_b,
    stride_x_t,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.full((BLOCK,), True, tl.int1) if EVEN else d < size
    x_row = x_ptr + ((row // T) * stride_x_b + (row % T) * stride_x_t) * UNIT
    gate = tl.load(x_row + d, mask=inside, other=0.0)
    up = tl.load(x_row + size + d, mask=inside, other=0.0)
    # rounded in between, as plain PyTorch rounds
    gated = silu(gate.to(tl.float32)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * size + d, (gated * up.to(tl.float32)).to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(_silu_and_mul_kernel)


def silu_and_mul(x: Tensor) -> Tensor:
    """Launch it; x as `fastmamba.ops.silu_and_mul` has it, already checked."""
    batch, tokens, width = x.shape
    size = width // 2
    x = unit_stride(x)
    y = x.new_empty((batch, tokens, size))
    stride_b, stride_t, _ = x.stride()
    unit = 1 if stride_b % 8 or stride_t % 8 else 8
    blocks = -(-size // _BLOCK)
    _launch(
        (batch * tokens * blocks, 1, 1),
        (x, y),
        (tokens, size, blocks, stride_b // unit, stride_t // unit),
        (_BLOCK, size % _BLOCK == 0, unit),
        num_warps=4,
    )
    return y
