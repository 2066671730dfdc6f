"""RMSNorm, with the residual add before it where there is one: one block per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher, unit_stride
from fastmamba.kernels._row import in_row, row_blocks

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _rms_norm_kernel(
    residual_ptr,
    x_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    T,
    eps,
    factor,
    stride_residual_b,
    stride_residual_t,
    stride_x_b,
    stride_x_t,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y = weight norm(s) with s = residual + factor x, rounded where plain PyTorch rounds: factor x, s, norm(s), y.

    Strides are in units of UNIT elements: rows start at multiples of it.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    i = tl.arange(0, BLOCK)
    # All loads come before the first store: the compiler moves none past a store, which might be to the same place.
    residuals = ()
    xs = ()
    weights = ()
    for start in tl.static_range(0, SIZE, BLOCK):
        d = start + i
        inside = in_row(start, BLOCK, SIZE)
        at = (b * stride_residual_b + t * stride_residual_t) * UNIT + d
        residuals = residuals + (tl.load(residual_ptr + at, mask=inside, other=0.0),)
        if x_ptr is not None:
            at = (b * stride_x_b + t * stride_x_t) * UNIT + d
            xs = xs + (tl.load(x_ptr + at, mask=inside, other=0.0),)
        weights = weights + (tl.load(weight_ptr + d, mask=inside, other=0.0),)
    parts = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(len(residuals)):
        s = residuals[j]
        if x_ptr is not None:
            x = xs[j]
            if SCALED:
                x = (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty)
            s = (s.to(tl.float32) + x.to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * SIZE + (j * BLOCK + i), s, mask=in_row(j * BLOCK, BLOCK, SIZE))
        s = s.to(DTYPE).to(tl.float32)
        squares += s * s
        parts = parts + (s,)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
    for j in tl.static_range(len(parts)):
        y = (parts[j] * scale).to(DTYPE).to(tl.float32) * weights[j].to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + row * SIZE + (j * BLOCK + i), y, mask=in_row(j * BLOCK, BLOCK, SIZE))


_launch = Launcher(_rms_norm_kernel)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Launch the norm; arguments as `fastmamba.ops.rms_norm`, already checked."""
    return _run(x, None, weight, eps, 1.0, None, dtype)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, factor: float, sum_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launch sum and norm; arguments as `fastmamba.ops.add_rms_norm`, already checked."""
    total = x.new_empty(x.shape, dtype=sum_dtype)
    return _run(residual, x, weight, eps, factor, total, dtype)


def _run(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    eps: float,
    factor: float,
    total: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = residual.shape
    residual = unit_stride(residual)
    x = None if x is None else unit_stride(x)
    y = residual.new_empty(residual.shape, dtype=torch.promote_types(weight.dtype, dtype))
    block, warps = row_blocks(width)
    if residual.element_size() == 4:
        # Threads take 16 bytes of float32, 8 of bfloat16: were it 16 of both, they would swap channels through memory.
        warps = max(block // 128, 1)
    strides = (*residual.stride()[:2], *((0, 0) if x is None else x.stride()[:2]))
    unit = 1 if any([stride % 8 for stride in strides]) else 8
    _launch(
        (batch * tokens, 1, 1),
        (residual, x, weight.contiguous(), total, y),
        (tokens, eps, factor, *[stride // unit for stride in strides]),
        (width, block, unit, factor != 1.0, _DTYPES[dtype]),
        num_warps=warps,
    )
    return y, residual if total is None else total
