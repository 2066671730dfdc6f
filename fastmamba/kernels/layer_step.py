"""One token through a whole Mamba-2 layer in three launches, for a batch so small that weights are read for one row.

    1. norm, input projection, convolution: the block that computes a channel also shifts its conv state
    2. state update and gate, a block per batch row, head and slice of P
    3. gated norm, output projection, residual

The norms need no launch of their own: every block of a projection reads all of its input anyway, and the norm's scale
is one number a row, applied to the products' sum. With `overlap`, a kernel starts while the one before it ends
(Hopper's programmatic dependent launch), and loads its first weights, or the states, before it waits for that one's
results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._row_product import first_weights, product, wait
from fastmamba.kernels._softplus import softplus
from fastmamba.kernels.mixer_step import _convolve, _shift, _window

_BLOCKS = 256
"""Blocks of the state update that keep a GPU busy; with fewer, a head is cut into slices of P."""


@triton.jit
def _in_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    conv_ptr,
    addresses_ptr,
    taps_ptr,
    conv_bias_ptr,
    u_ptr,
    E,
    eps,
    stride_x_b,
    stride_w,
    stride_c_b,
    stride_c_c,
    stride_c_w,
    K: tl.constexpr,
    INNER: tl.constexpr,
    CHANNELS: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    SILU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * R + tl.arange(0, R)
    has = r < E
    at, w = first_weights(weight_ptr, r, has, stride_w, K, BK)
    wait(OVERLAP)
    if addresses_ptr is not None:
        conv_ptr = tl.multiple_of(tl.load(addresses_ptr).to(conv_ptr.dtype), 16)
    u = product(x_ptr + b * stride_x_b, norm_ptr, at, w, r, has, eps, K, R, BK)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + r, mask=has, other=0.0).to(tl.float32)
    u = u.to(u_ptr.dtype.element_ty)  # as the convolution sees it in a prefill

    # A row of the projection: z (D) | x (D) | B (G*N) | C (G*N) | dt (H); the convolution sees x | B | C.
    seen = (r >= INNER) & (r < INNER + CHANNELS)
    c = tl.where(seen, r - INNER, 0)
    conv_ptr += b * stride_c_b
    window = _window(u, conv_ptr, c, seen, stride_c_c, stride_c_w, S, BS)
    y = _convolve(u, window, conv_ptr, taps_ptr, conv_bias_ptr, c, seen, stride_c_c, S, BS, W, SILU)
    tl.store(u_ptr + b * E + r, tl.where(seen, y, u.to(tl.float32)).to(u_ptr.dtype.element_ty), mask=has)
    tl.debug_barrier()  # every slot is read before any is written
    _shift(window, conv_ptr, c, seen, stride_c_c, stride_c_w, S, BS)


@triton.jit
def _state_kernel(
    u_ptr,
    state_ptr,
    addresses_ptr,
    A_log_ptr,
    D_ptr,
    dt_bias_ptr,
    y_ptr,
    E,
    H,
    heads_per_group,
    stride_s_b,
    stride_s_h,
    stride_s_p,
    stride_s_n,
    INNER: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if addresses_ptr is not None:
        state_ptr = tl.multiple_of(tl.load(addresses_ptr + 1).to(state_ptr.dtype), 16)
    b = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    g = h // heads_per_group
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    has_p = p < P
    has_n = n < N
    has = has_p[:, None] & has_n[None, :]
    at = state_ptr + b * stride_s_b + h * stride_s_h + p[:, None] * stride_s_p + n[None, :] * stride_s_n
    state = tl.load(at, mask=has, other=0.0).to(tl.float32)  # [P, N]; the kernel before this one does not write it
    A = -tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
    skip = tl.load(D_ptr + h).to(tl.float32)
    bias = tl.load(dt_bias_ptr + h).to(tl.float32)
    wait(OVERLAP)

    u_ptr += b * E
    z = tl.load(u_ptr + h * P + p, mask=has_p, other=0.0).to(tl.float32)
    u_ptr += INNER
    x = tl.load(u_ptr + h * P + p, mask=has_p, other=0.0).to(tl.float32)
    u_ptr += INNER
    Bv = tl.load(u_ptr + g * N + n, mask=has_n, other=0.0).to(tl.float32)
    Cv = tl.load(u_ptr + (GROUPS + g) * N + n, mask=has_n, other=0.0).to(tl.float32)
    dt = softplus(tl.load(u_ptr + 2 * GROUPS * N + h).to(tl.float32) + bias)
    state = state * tl.exp(dt * A) + (dt * x)[:, None] * Bv[None, :]
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=has)
    y = tl.sum(state * Cv[None, :], axis=1) + x * skip
    tl.store(y_ptr + b * INNER + h * P + p, y * z * tl.sigmoid(z), mask=has_p)


@triton.jit
def _out_kernel(
    y_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    rows,
    eps,
    scale,
    stride_w,
    stride_r_b,
    K: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * R + tl.arange(0, R)
    has = r < rows
    at, w = first_weights(weight_ptr, r, has, stride_w, K, BK)
    wait(OVERLAP)
    y = product(y_ptr + b * K, norm_ptr, at, w, r, has, eps, K, R, BK)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + r, mask=has, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y = y * scale + tl.load(residual_ptr + b * stride_r_b + r, mask=has, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * rows + r, y.to(out_ptr.dtype.element_ty), mask=has)


_launch_in = Launcher(_in_kernel)
_launch_state = Launcher(_state_kernel)
_launch_out = Launcher(_out_kernel)


def layer_step(
    x: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate_weight: Tensor | None,
    gate_eps: float,
    residual_scale: float | None,
    activation: str | None,
    addresses: Tensor | None,
    overlap: bool,
) -> Tensor:
    """Launch the step; arguments as `fastmamba.ops.layer_step`, already checked."""
    batch, heads, head_dim, width = state.shape
    inner = heads * head_dim
    entries, size = in_weight.shape
    slots = conv_state.shape[2]
    u = in_weight.new_empty((batch, entries))
    y = in_weight.new_empty((batch, inner), dtype=torch.float32)
    residual = None if residual_scale is None else x
    out = in_weight.new_empty((batch, out_weight.shape[0]), dtype=in_weight.dtype if residual is None else x.dtype)
    options = {"launch_pdl": True} if overlap else {}
    rows, columns, warps = _shape(entries, size)
    _launch_in(
        (-(-entries // rows), batch, 1),
        (
            x,
            in_weight,
            _flat(in_bias),
            _flat(norm_weight),
            conv_state,
            addresses,
            conv_weight.contiguous(),
            _flat(conv_bias),
            u,
        ),
        (entries, norm_eps, x.stride(0), in_weight.stride(0), *conv_state.stride()),
        (
            *(size, inner, conv_state.shape[1], slots, _power_of_2(slots), conv_weight.shape[1], rows, columns),
            activation is not None,
            overlap,
        ),
        num_warps=warps,
        **options,
    )
    block_p = min(_power_of_2(head_dim), 32)
    while block_p > 8 and batch * heads * -(-head_dim // block_p) < _BLOCKS:
        block_p //= 2
    _launch_state(
        (batch * heads, -(-head_dim // block_p), 1),
        (u, state, addresses, _flat(A_log), _flat(D), _flat(dt_bias), y),
        (entries, heads, heads // groups, *state.stride()),
        (inner, groups, head_dim, width, block_p, _power_of_2(width), overlap),
        num_warps=4,
        **options,
    )
    rows, columns, warps = _shape(out_weight.shape[0], inner)
    scale = 1.0 if residual_scale is None else float(residual_scale)
    _launch_out(
        (-(-out_weight.shape[0] // rows), batch, 1),
        (y, out_weight, _flat(out_bias), _flat(gate_weight), residual, out),
        (out_weight.shape[0], gate_eps, scale, out_weight.stride(0), 0 if residual is None else x.stride(0)),
        (inner, rows, columns, overlap),
        num_warps=warps,
        **options,
    )
    return out


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _shape(rows: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of a weight that a block takes at a time, and its warps."""
    if rows > 4096:
        return 8, 512, 4
    return 2, 1024 if width % 1024 == 0 else 512, 4


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
