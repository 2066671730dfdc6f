"""One token through a whole Mamba-2 layer in three launches, for a batch so small that weights are read for one row.

    1. norm, input projection; of B and C also the convolution, for they belong to many heads
    2. convolution of x, state update and gate, a block per batch row, head and slice of P
    3. gated norm, output projection, residual

The norms need no launch of their own: every block of a projection reads all of its input anyway, and the norm's scale
is one number a row, applied to the products' sum. A block of a projection keeps that input in registers and takes
several groups of rows, and the weights of the next group are on their way while it is at work on one.

With `overlap`, a kernel starts while the one before it ends (Hopper's programmatic dependent launch), and before it
waits for that one's results it loads what does not depend on them: its first weights, or the states.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._row_product import load_tiles, load_vector, normed, times, wait
from fastmamba.kernels._softplus import softplus
from fastmamba.kernels.mixer_step import _addressed, _convolve, _shift, _slots, _taps

_BLOCKS = 256
"""Blocks of the state update that keep a GPU busy; with fewer, a head is cut into slices of P."""


@triton.jit
def _rows(group, rows, R: tl.constexpr):
    """Rows that a group has, and which of them there are. [R]"""
    r = group * R + tl.arange(0, R)
    return r, (r >= 0) & (r < rows)


@triton.jit
def _weights(weight_ptr, r, has, stride_w, K: tl.constexpr, BK: tl.constexpr):
    at = weight_ptr + r.to(tl.int64)[:, None] * stride_w + tl.arange(0, BK)[None, :]
    return load_tiles(at, has, K, BK, (K + BK - 1) // BK)


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
    # A row of the projection: z (D) | x (D) | B (G*N) | C (G*N) | dt (H); the convolution sees x | B | C. The last rows
    # come first, because a convolution takes longer.
    b = tl.program_id(1).to(tl.int64)
    step = tl.num_programs(0)
    first = tl.program_id(0)
    last = tl.cdiv(E, R) - 1
    r, has = _rows(last - first, E, R)
    weights = _weights(weight_ptr, r, has, stride_w, K, BK)
    norm = load_vector(norm_ptr, K, R, BK)
    wait(OVERLAP)
    if addresses_ptr is not None:
        conv_ptr = tl.multiple_of(tl.load(addresses_ptr).to(conv_ptr.dtype), 16)
    conv_ptr += b * stride_c_b
    u_ptr += b * E
    vector, scale = normed(load_vector(x_ptr + b * stride_x_b, K, R, BK), norm, norm_ptr, eps, K, R, BK)
    for turn in tl.range(first, last + 1, step, num_stages=1):  # upwards: Triton compiles no other
        group = last - turn
        r_next, has_next = _rows(group - step, E, R)
        weights_next = _weights(weight_ptr, r_next, has_next, stride_w, K, BK)
        r, has = _rows(group, E, R)
        u = times(weights, vector, K, R, BK) * scale
        if bias_ptr is not None:
            u += tl.load(bias_ptr + r, mask=has, other=0.0).to(tl.float32)
        u = u.to(u_ptr.dtype.element_ty)  # as the convolution sees it in a prefill
        if (group * R + R > 2 * INNER) & (group * R < INNER + CHANNELS):
            seen = (r >= 2 * INNER) & (r < INNER + CHANNELS)
            c = tl.where(seen, r - INNER, 0)
            slots = _slots(conv_ptr, c, seen, stride_c_c, stride_c_w, S, BS)
            taps, rest = _taps(conv_ptr, taps_ptr, conv_bias_ptr, c, seen, stride_c_c, S, BS, W)
            y = _convolve(u, slots, taps, rest, S, BS, SILU)
            tl.debug_barrier()  # every slot is read before any is written
            _shift(u, slots, conv_ptr, c, seen, stride_c_c, stride_c_w, S, BS)
            u = tl.where(seen, y, u.to(tl.float32)).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + r, u, mask=has)
        weights = weights_next


@triton.jit
def _state_kernel(
    u_ptr,
    conv_ptr,
    state_ptr,
    addresses_ptr,
    taps_ptr,
    conv_bias_ptr,
    A_log_ptr,
    D_ptr,
    dt_bias_ptr,
    y_ptr,
    E,
    H,
    heads_per_group,
    stride_c_b,
    stride_c_c,
    stride_c_w,
    stride_s_b,
    stride_s_h,
    stride_s_p,
    stride_s_n,
    INNER: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    SILU: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()  # before the wait: the output projection's first weights come meanwhile, too
    conv_ptr, state_ptr = _addressed(conv_ptr, state_ptr, addresses_ptr)
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
    conv_ptr += b * stride_c_b
    c = tl.where(has_p, h * P + p, 0)
    slots = _slots(conv_ptr, c, has_p, stride_c_c, stride_c_w, S, BS)
    taps, rest = _taps(conv_ptr, taps_ptr, conv_bias_ptr, c, has_p, stride_c_c, S, BS, W)
    if OVERLAP:
        gdc_wait()

    u_ptr += b * E
    z = tl.load(u_ptr + c, mask=has_p, other=0.0).to(tl.float32)
    u_ptr += INNER
    u = tl.load(u_ptr + c, mask=has_p, other=0.0)
    u_ptr += INNER
    Bv = tl.load(u_ptr + g * N + n, mask=has_n, other=0.0).to(tl.float32)
    Cv = tl.load(u_ptr + (GROUPS + g) * N + n, mask=has_n, other=0.0).to(tl.float32)
    dt = softplus(tl.load(u_ptr + 2 * GROUPS * N + h).to(tl.float32) + bias)
    x = _convolve(u, slots, taps, rest, S, BS, SILU).to(u_ptr.dtype.element_ty).to(tl.float32)
    state = state * tl.exp(dt * A) + (dt * x)[:, None] * Bv[None, :]
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=has)
    y = tl.sum(state * Cv[None, :], axis=1) + x * skip
    tl.store(y_ptr + b * INNER + c, y * z * tl.sigmoid(z), mask=has_p)
    tl.debug_barrier()  # every slot is read before any is written
    _shift(u, slots, conv_ptr, c, has_p, stride_c_c, stride_c_w, S, BS)


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
    step = tl.num_programs(0)
    first = tl.program_id(0)
    r, has = _rows(first, rows, R)
    weights = _weights(weight_ptr, r, has, stride_w, K, BK)
    norm = load_vector(norm_ptr, K, R, BK)
    wait(OVERLAP)
    vector, norm_scale = normed(load_vector(y_ptr + b * K, K, R, BK), norm, norm_ptr, eps, K, R, BK)
    for group in tl.range(first, tl.cdiv(rows, R), step, num_stages=1):
        r_next, has_next = _rows(group + step, rows, R)
        weights_next = _weights(weight_ptr, r_next, has_next, stride_w, K, BK)
        r, has = _rows(group, rows, R)
        added = tl.zeros((R,), tl.float32)
        if residual_ptr is not None:  # asked for before the product, which takes as long as it takes to come
            added = tl.load(residual_ptr + b * stride_r_b + r, mask=has, other=0.0).to(tl.float32)
        y = times(weights, vector, K, R, BK) * norm_scale
        if bias_ptr is not None:
            y += tl.load(bias_ptr + r, mask=has, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            y = y * scale + added
        tl.store(out_ptr + b * rows + r, y.to(out_ptr.dtype.element_ty), mask=has)
        weights = weights_next


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
    rows, columns, warps = _shape(size, in_weight.element_size())
    _launch_in(
        (_blocks(-(-entries // rows), warps, x.device), batch, 1),
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
        (
            *(u, conv_state, state, addresses, conv_weight.contiguous(), _flat(conv_bias)),
            *(_flat(A_log), _flat(D), _flat(dt_bias), y),
        ),
        (entries, heads, heads // groups, *conv_state.stride(), *state.stride()),
        (
            *(inner, groups, head_dim, width, slots, _power_of_2(slots), conv_weight.shape[1], block_p),
            *(_power_of_2(width), activation is not None, overlap),
        ),
        num_warps=4,
        **options,
    )
    rows, columns, warps = _shape(inner, out_weight.element_size())
    scale = 1.0 if residual_scale is None else float(residual_scale)
    _launch_out(
        (_blocks(-(-out_weight.shape[0] // rows), warps, x.device), batch, 1),
        (y, out_weight, _flat(out_bias), _flat(gate_weight), residual, out),
        (out_weight.shape[0], gate_eps, scale, out_weight.stride(0), 0 if residual is None else x.stride(0)),
        (inner, rows, columns, overlap),
        num_warps=warps,
        **options,
    )
    return out


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _shape(width: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of a group, columns of a tile and warps of a block: two groups of weights and the vector fit registers."""
    size = width * itemsize
    columns = 1024 if width > 2048 and width % 1024 == 0 else 512
    warps = 4 if size <= 10240 else 8 if size <= 20480 else 16
    return 4 if size * 4 <= 20480 * (warps // 4) else 2, columns, warps


def _blocks(groups: int, warps: int, device: torch.device) -> int:
    """Blocks for so many groups of rows: as many as run at once, which is four of four warps on a multiprocessor."""
    if device.type != "cuda":
        return min(groups, 3)
    return min(groups, _multiprocessors(device.index) * 16 // warps)


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
