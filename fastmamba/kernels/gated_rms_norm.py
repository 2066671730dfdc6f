"""Gated RMSNorm: one block per token and group, one read and one write of each activation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._row import in_row, row_blocks
from fastmamba.kernels._silu import silu


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
    UNIT: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
):
    """One group of one token, in blocks of BLOCK channels that all stay in registers.

    Strides over batch and tokens are in units of UNIT elements: rows start at multiples of it.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    b = row // T
    t = row % T
    i = tl.arange(0, BLOCK)
    x_row = x_ptr + (b * stride_x_b + t * stride_x_t) * UNIT
    # All loads come before the first store: the compiler moves none past a store, which might be to the same place.
    parts = ()
    gates = ()
    weights = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        d = group * SIZE + (start + i)
        inside = in_row(start, BLOCK, SIZE)
        x = tl.load(x_row + d * stride_x_d, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate_row = gate_ptr + (b * stride_gate_b + t * stride_gate_t) * UNIT
            gate = tl.load(gate_row + d * stride_gate_d, mask=inside, other=0.0)
            if NORM_BEFORE_GATE:
                gates = gates + (gate,)
            else:
                x *= silu(gate.to(tl.float32))
        squares += x * x
        parts = parts + (x,)
        weights = weights + (tl.load(weight_ptr + d, mask=inside, other=0.0),)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / SIZE + eps)
    y_row = y_ptr + row * (groups * SIZE)
    for j in tl.static_range(len(parts)):
        y = parts[j] * scale * weights[j].to(tl.float32)
        if gate_ptr is not None:
            if NORM_BEFORE_GATE:
                y *= silu(gates[j].to(tl.float32))
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_row + (group * SIZE + (j * BLOCK + i)), y, mask=in_row(j * BLOCK, BLOCK, SIZE))


_launch_norm = Launcher(_norm_kernel)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    in_place: bool = False,
) -> Tensor:
    """Launch the norm; arguments as `fastmamba.ops.gated_rms_norm`, already checked.

    With `in_place`, x is contiguous and takes the result: a block reads all of its row before it writes.
    """
    batch, tokens, width = x.shape
    y = x if in_place else x.new_empty((batch, tokens, width))
    block, warps = row_blocks(group_size)
    unit = 16 // x.element_size()
    x_b, x_t, x_d = x.stride()
    gate_b, gate_t, gate_d = (0, 0, 0) if gate is None else gate.stride()
    if x_b % unit or x_t % unit or gate_b % unit or gate_t % unit:
        unit = 1
    groups = width // group_size
    _launch_norm(
        (batch * tokens, groups, 1),
        (x, weight.contiguous(), gate, y),
        (tokens, groups, eps, x_b // unit, x_t // unit, x_d, gate_b // unit, gate_t // unit, gate_d),
        (group_size, block, unit, norm_before_gate),
        num_warps=warps,
    )
    return y
