"""One token through the middle of a Mamba-2 mixer: from the projection to the normed output, in two launches.

The first runs a block per batch row, head and slice of P: convolution, SiLU, softplus of dt, state update, output. The
channels of B and C belong to all heads of a group, so every block convolves them anew and none of them may shift their
conv state, which another block may still be reading: that is left to the second launch, which norms at the same time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._softplus import softplus

_BLOCKS = 256
"""Blocks that keep a GPU busy; with fewer, a head is cut into slices of P."""
_LARGEST_P = 32
"""Rows of the state that a block holds at most; 64 take 234 registers a thread."""
_SHIFTED = 256
"""Channels of the conv state that a block of the second launch shifts."""


@triton.jit
def _slots(conv_ptr, c, has, stride_c_c, stride_c_w, S: tl.constexpr, BS: tl.constexpr):
    """The conv state of channels c, every slot holding what the next one held; the last one is for x. [C, S]"""
    s = tl.arange(0, BS)
    at = conv_ptr + c[:, None] * stride_c_c + (s[None, :] + 1) * stride_c_w
    return tl.load(at, mask=has[:, None] & (s < S - 1)[None, :], other=0.0)


@triton.jit
def _shift(x, slots, conv_ptr, c, has, stride_c_c, stride_c_w, S: tl.constexpr, BS: tl.constexpr):
    """Store slots, x in the last one. A barrier has to stand between their loads and this: threads share channels."""
    s = tl.arange(0, BS)
    at = conv_ptr + c[:, None] * stride_c_c + s[None, :] * stride_c_w
    window = tl.where((s == S - 1)[None, :], x[:, None].to(slots.dtype), slots)
    tl.store(at, window, mask=has[:, None] & (s < S)[None, :])


@triton.jit
def _taps(
    conv_ptr,
    weight_ptr,
    bias_ptr,
    c,
    has,
    stride_c_c,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
):
    """The convolution's weights for channels c, beside their slots, and what is added, in float32. [C, S], [C]"""
    k = tl.arange(0, BS) - (S - W)
    seen = has[:, None] & ((k >= 0) & (k < W))[None, :]
    taps = tl.load(weight_ptr + c[:, None] * W + k[None, :], mask=seen, other=0.0).to(tl.float32)
    rest = tl.zeros(c.shape, tl.float32)
    if S < W:  # S == W - 1: the oldest input is not in the slots any more
        oldest = tl.load(conv_ptr + c * stride_c_c, mask=has, other=0.0).to(tl.float32)
        rest += oldest * tl.load(weight_ptr + c * W, mask=has, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        rest += tl.load(bias_ptr + c, mask=has, other=0.0).to(tl.float32)
    return taps, rest


@triton.jit
def _convolve(x, slots, taps, rest, S: tl.constexpr, BS: tl.constexpr, SILU: tl.constexpr):
    """The convolution's output at x, in float32. [C]"""
    last = (tl.arange(0, BS) == S - 1)[None, :]
    y = tl.sum(tl.where(last, x[:, None].to(tl.float32), slots.to(tl.float32)) * taps, axis=1) + rest
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _addressed(conv_ptr, state_ptr, addresses_ptr):
    """The states, at the addresses that a table holds while the kernel runs instead of those of its launch."""
    if addresses_ptr is not None:
        conv_ptr = tl.multiple_of(tl.load(addresses_ptr).to(conv_ptr.dtype), 16)
        state_ptr = tl.multiple_of(tl.load(addresses_ptr + 1).to(state_ptr.dtype), 16)
    return conv_ptr, state_ptr


@triton.jit
def _step_kernel(
    u_ptr,
    conv_ptr,
    state_ptr,
    addresses_ptr,
    weight_ptr,
    conv_bias_ptr,
    A_log_ptr,
    D_ptr,
    dt_bias_ptr,
    y_ptr,
    H,
    heads_per_group,
    stride_u_b,
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
    GATED: tl.constexpr,
):
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
    state = tl.load(at, mask=has, other=0.0).to(tl.float32)  # [P, N]; first, for it is the slowest to come

    # A row of the projection: z (D) | x (D) | B (G*N) | C (G*N) | dt (H); the convolution sees x | B | C.
    u_ptr += b * stride_u_b
    conv_ptr += b * stride_c_b
    x_at = h * P + p
    b_at = INNER + g * N + n
    c_at = INNER + (GROUPS + g) * N + n
    u_x = tl.load(u_ptr + INNER + x_at, mask=has_p, other=0.0)
    u_B = tl.load(u_ptr + INNER + b_at, mask=has_n, other=0.0)
    u_C = tl.load(u_ptr + INNER + c_at, mask=has_n, other=0.0)
    x_slots = _slots(conv_ptr, x_at, has_p, stride_c_c, stride_c_w, S, BS)
    B_slots = _slots(conv_ptr, b_at, has_n, stride_c_c, stride_c_w, S, BS)
    C_slots = _slots(conv_ptr, c_at, has_n, stride_c_c, stride_c_w, S, BS)
    x_taps, x_rest = _taps(conv_ptr, weight_ptr, conv_bias_ptr, x_at, has_p, stride_c_c, S, BS, W)
    B_taps, B_rest = _taps(conv_ptr, weight_ptr, conv_bias_ptr, b_at, has_n, stride_c_c, S, BS, W)
    C_taps, C_rest = _taps(conv_ptr, weight_ptr, conv_bias_ptr, c_at, has_n, stride_c_c, S, BS, W)
    x = _convolve(u_x, x_slots, x_taps, x_rest, S, BS, SILU)
    Bv = _convolve(u_B, B_slots, B_taps, B_rest, S, BS, SILU)
    Cv = _convolve(u_C, C_slots, C_taps, C_rest, S, BS, SILU)
    dt = tl.load(u_ptr + 2 * INNER + 2 * GROUPS * N + h).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + h).to(tl.float32))
    A = -tl.exp(tl.load(A_log_ptr + h).to(tl.float32))

    state = state * tl.exp(dt * A) + (dt * x)[:, None] * tl.expand_dims(Bv, 0)
    tl.store(at, state.to(state_ptr.dtype.element_ty), mask=has)
    y = tl.sum(state * tl.expand_dims(Cv, 0), axis=1)
    y += x * tl.load(D_ptr + h).to(tl.float32)
    if GATED:
        z = tl.load(u_ptr + x_at, mask=has_p, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(y_ptr + b * INNER + x_at, y.to(y_ptr.dtype.element_ty), mask=has_p)
    tl.debug_barrier()  # every slot is read before any is written
    _shift(u_x, x_slots, conv_ptr, x_at, has_p, stride_c_c, stride_c_w, S, BS)


@triton.jit
def _norm_kernel(
    y_ptr,
    u_ptr,
    conv_ptr,
    addresses_ptr,
    norm_ptr,
    out_ptr,
    norm_blocks,
    eps,
    stride_u_b,
    stride_c_b,
    stride_c_c,
    stride_c_w,
    INNER: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    NORM: tl.constexpr,
    GATE_AFTER: tl.constexpr,
):
    """Blocks below norm_blocks norm a row's group, the others shift the conv state of B and C (SHARED channels)."""
    b = tl.program_id(1).to(tl.int64)
    u_ptr += b * stride_u_b
    if tl.program_id(0) < norm_blocks:
        if NORM:
            d = tl.arange(0, BLOCK)
            inside = d < SIZE
            d += tl.program_id(0) * SIZE
            y = tl.load(y_ptr + b * INNER + d, mask=inside, other=0.0)
            z = tl.load(u_ptr + d, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
            silu = z * tl.sigmoid(z)
            if not GATE_AFTER:
                y *= silu
            y *= tl.rsqrt(tl.sum(y * y, axis=0) / SIZE + eps) * weight
            if GATE_AFTER:
                y *= silu
            tl.store(out_ptr + b * INNER + d, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        if addresses_ptr is not None:
            conv_ptr = tl.multiple_of(tl.load(addresses_ptr).to(conv_ptr.dtype), 16)
        c = (tl.program_id(0) - norm_blocks) * BC + tl.arange(0, BC)
        has = c < SHARED
        c += INNER
        conv_ptr += b * stride_c_b
        x = tl.load(u_ptr + INNER + c, mask=has, other=0.0)
        slots = _slots(conv_ptr, c, has, stride_c_c, stride_c_w, S, BS)
        tl.debug_barrier()
        _shift(x, slots, conv_ptr, c, has, stride_c_c, stride_c_w, S, BS)


_launch_step = Launcher(_step_kernel)
_launch_norm = Launcher(_norm_kernel)


def mixer_step(
    projected: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    eps: float,
    group_size: int,
    gate: str,
    activation: str | None,
    addresses: Tensor | None,
) -> Tensor:
    """Launch the step; arguments as `fastmamba.ops.mixer_step`, already checked."""
    batch, heads, head_dim, width = state.shape
    inner = heads * head_dim
    slots = conv_state.shape[2]
    norm = norm_weight is not None
    y = projected.new_empty((batch, inner))
    raw = projected.new_empty((batch, inner), dtype=torch.float32) if norm else y
    block_p = min(_power_of_2(head_dim), _LARGEST_P)
    while block_p > 16 and batch * heads * -(-head_dim // block_p) < _BLOCKS:
        block_p //= 2
    window = _power_of_2(slots)
    stride = projected.stride(0)
    _launch_step(
        (batch * heads, -(-head_dim // block_p), 1),
        (
            projected,
            conv_state,
            state,
            addresses,
            conv_weight.contiguous(),
            None if conv_bias is None else conv_bias.contiguous(),
            A_log.contiguous(),
            D.contiguous(),
            dt_bias.contiguous(),
            raw,
        ),
        (heads, heads // groups, stride, *conv_state.stride(), *state.stride()),
        (
            *(inner, groups, head_dim, width, slots, window, conv_weight.shape[1], block_p, _power_of_2(width)),
            activation is not None,
            gate == "before" and not norm,
        ),
        num_warps=4,
    )
    shared = 2 * groups * width
    channels = min(_SHIFTED, _power_of_2(shared))
    norm_blocks = inner // group_size if norm else 0
    block = _power_of_2(group_size)
    _launch_norm(
        (norm_blocks + -(-shared // channels), batch, 1),
        (raw, projected, conv_state, addresses, norm_weight.contiguous() if norm else None, y),
        (norm_blocks, eps, stride, *conv_state.stride()),
        (inner, shared, group_size, block, slots, window, channels, norm, gate == "after"),
        num_warps=min(max(block // 512, 1), 16) if norm else 4,
    )
    return y


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is no less."""
    return 1 << (number - 1).bit_length()
