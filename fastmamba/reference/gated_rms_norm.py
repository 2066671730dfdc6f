"""RMS norm with a SiLU gate, in plain PyTorch, a few rows at a time."""

from __future__ import annotations

import torch

from ._common import Scratch, cast, compute_dtype_of, needs_grad, silu

_BLOCK = 1 << 19  # elements normed at a time, in two float32 buffers


def gated_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
) -> torch.Tensor:
    """``norm(x silu(gate)) weight``, or ``norm(x) weight silu(gate)`` with ``norm_before_gate``. Differentiable.

    Args:
        x: (..., D).
        weight: (D,).
        gate: (..., D), any strides, or None for no gate.
        eps: added to the mean square.
        group_size: divides D; each such run of channels is normed by itself. None: all of D.
        norm_before_gate: whether the gate comes after the norm.

    Returns:
        y (..., D), contiguous, in x.dtype. Arithmetic is in float32 (float64 for float64 inputs).
    """
    dtype = compute_dtype_of(x)
    width = x.shape[-1]
    group_size = group_size or width
    recording = needs_grad(x, weight, gate)
    scratch = Scratch(dtype, x.device, recording)
    weight = weight.to(dtype)
    rows = x.reshape(-1, width)  # a view, also of a slice of one projection
    gates = None if gate is None else gate.reshape(-1, width)
    if recording:
        return _norm(rows, weight, gates, eps, group_size, norm_before_gate, scratch, None).view(x.shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    results = y.view(-1, width)
    step = max(1, _BLOCK // width)
    for start in range(0, rows.shape[0], step):
        block = slice(start, start + step)
        gate_block = None if gates is None else gates[block]
        _norm(rows[block], weight, gate_block, eps, group_size, norm_before_gate, scratch, results[block])
    return y


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    scratch: Scratch,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Norm the rows (R, D), into ``out`` where there is one."""
    dtype, shape = scratch.dtype, tuple(x.shape)
    y = cast(x, dtype, scratch("y", shape))
    if gate is not None and not norm_before_gate:
        y = torch.mul(y, silu(gate, dtype, scratch("other", shape)), out=scratch("y", shape))
    grouped = y.unflatten(1, (-1, group_size))
    by_group = tuple(grouped.shape)
    squares = torch.mul(grouped, grouped, out=scratch("other", by_group))
    scale = torch.rsqrt(squares.mean(2, keepdim=True) + eps)
    y = torch.mul(grouped, scale, out=scratch("y", by_group)).view(shape)
    if gate is not None and norm_before_gate:
        y = torch.mul(y, silu(gate, dtype, scratch("other", shape)), out=scratch("y", shape))
    target = out if out is not None and out.dtype == dtype else scratch("y", shape)
    y = torch.mul(y, weight, out=target)
    if out is None:
        return y.to(x.dtype)
    return out if y is out else out.copy_(y)
