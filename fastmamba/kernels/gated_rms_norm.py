"""Gated RMSNorm: one block per token and group, one read and one write of each activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    gate_ptr,
    y_ptr,
    T,
    groups,
    eps,
    stride_x_b,
    stride_x_t,
    stride_x_d,
    stride_gate_b,
    stride_gate_t,
    stride_gate_d,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    b = row // T
    t = row % T
    d = tl.arange(0, BLOCK)
    inside = d < SIZE
    d += group * SIZE
    x = tl.load(x_ptr + b * stride_x_b + t * stride_x_t + d * stride_x_d, mask=inside, other=0.0).to(tl.float32)
    gated = x
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + b * stride_gate_b + t * stride_gate_t + d * stride_gate_d, mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        silu = gate * tl.sigmoid(gate)
        if not NORM_BEFORE_GATE:
            gated = x * silu
    scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / SIZE + eps)
    y = gated * scale * tl.load(weight_ptr + d, mask=inside, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        if NORM_BEFORE_GATE:
            y *= silu
    tl.store(y_ptr + row * (groups * SIZE) + d, y.to(y_ptr.dtype.element_ty), mask=inside)


_launch_norm = Launcher(_norm_kernel)


def gated_rms_norm(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """Launch the norm; arguments as `fastmamba.ops.gated_rms_norm`, already checked."""
    batch, tokens, width = x.shape
    y = x.new_empty((batch, tokens, width))
    block = 1 << (group_size - 1).bit_length()
    groups = width // group_size
    _launch_norm(
        (batch * tokens, groups, 1),
        (x, weight.contiguous(), gate, y),
        (tokens, groups, eps, *x.stride(), *((0, 0, 0) if gate is None else gate.stride())),
        (group_size, block, norm_before_gate),
        num_warps=min(max(block // 512, 1), 16),
    )
    return y
