"""One token of the SSD recurrence; one block per batch row, head and slice of P."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import on_device
from fastmamba.kernels._softplus import softplus


@triton.jit
def _step_kernel(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    H,
    heads_per_group,
    stride_s_b,
    stride_s_h,
    stride_s_p,
    stride_s_n,
    stride_x_b,
    stride_x_h,
    stride_x_p,
    stride_dt_b,
    stride_dt_h,
    stride_B_b,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_g,
    stride_C_n,
    stride_z_b,
    stride_z_h,
    stride_z_p,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
):
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    g = h // heads_per_group
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    has_p = p < P
    has_n = n < N
    has = has_p[:, None] & has_n[None, :]

    at = state_ptr + b * stride_s_b + h * stride_s_h + p[:, None] * stride_s_p + n[None, :] * stride_s_n
    state = tl.load(at, mask=has, other=0.0).to(tl.float32)  # [P, N]
    x = tl.load(x_ptr + b * stride_x_b + h * stride_x_h + p * stride_x_p, mask=has_p, other=0.0).to(tl.float32)
    Bv = tl.load(B_ptr + b * stride_B_b + g * stride_B_g + n * stride_B_n, mask=has_n, other=0.0).to(tl.float32)
    Cv = tl.load(C_ptr + b * stride_C_b + g * stride_C_g + n * stride_C_n, mask=has_n, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + b * stride_dt_b + h * stride_dt_h).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + h).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    A = tl.load(A_ptr + h).to(tl.float32)

    state = state * tl.exp(dt * A) + (dt * x)[:, None] * Bv[None, :]
    y = tl.sum(state * Cv[None, :], axis=1)
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=has)
    if D_ptr is not None:
        if D_PER_CHANNEL:
            y += x * tl.load(D_ptr + h * P + p, mask=has_p, other=0.0).to(tl.float32)
        else:
            y += x * tl.load(D_ptr + h).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + b * stride_z_b + h * stride_z_h + p * stride_z_p, mask=has_p, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + (b * H + h) * P + p, y.to(y_ptr.dtype.element_ty), mask=has_p)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Launch the step; arguments as `fastmamba.ops.ssd_step`, already checked."""
    batch, heads, head_dim = x.shape
    width = B.shape[2]
    y = x.new_empty((batch, heads, head_dim))
    block_n = triton.next_power_of_2(width)
    block_p = max(1, min(triton.next_power_of_2(head_dim), 4096 // block_n))
    with on_device(x):
        _step_kernel[(batch * heads, triton.cdiv(head_dim, block_p))](
            state,
            x,
            dt,
            A.contiguous(),
            B,
            C,
            None if D is None else D.contiguous(),
            z,
            None if dt_bias is None else dt_bias.contiguous(),
            y,
            heads,
            heads // B.shape[1],
            *state.stride(),
            *x.stride(),
            *dt.stride(),
            *B.stride(),
            *C.stride(),
            *((0, 0, 0) if z is None else z.stride()),
            P=head_dim,
            N=width,
            BP=block_p,
            BN=block_n,
            SOFTPLUS=dt_softplus,
            D_PER_CHANNEL=D is not None and D.ndim == 2,
            num_warps=4,
        )
    return y
