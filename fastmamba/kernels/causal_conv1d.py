"""Depthwise causal convolution with SiLU, token-major, and its one-token step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._silu import silu

_CHANNELS = 256  # of one program, 8 a thread: 16 bytes of bfloat16


@triton.jit
def _both(block, scalar):
    """A block of conditions and one more for all of it. (Triton's interpreter would widen their `&` to int32.)"""
    return tl.where(scalar, block, False)


@triton.jit
def _conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    init_ptr,
    mask_ptr,
    final_ptr,
    y_ptr,
    T,
    channels,
    channel_blocks,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_weight_c,
    stride_weight_k,
    stride_init_b,
    stride_init_c,
    stride_init_k,
    stride_mask_b,
    stride_mask_t,
    stride_final_b,
    stride_final_c,
    stride_final_s,
    W: tl.constexpr,
    S: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BC: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """ROWS tokens of BC channels. All loads come first, to be in flight together; each token is loaded once.

    stride_x_b and stride_x_t are in units of UNIT elements: rows start at multiples of it.
    PACKED is the dtype of the weights where all W = 4 taps of a channel are loaded as one int64, else None.
    """
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    c = (block % channel_blocks) * BC + tl.arange(0, BC)
    has_c = tl.full((BC,), True, tl.int1) if EVEN else c < channels
    first = (block // channel_blocks).to(tl.int64) * ROWS
    x_col = x_ptr + b * stride_x_b * UNIT + c.to(tl.int64) * stride_x_c
    y_col = y_ptr + b * T * channels + c

    rows = ()  # W - 1 tokens before the first, then ROWS
    for r in tl.static_range(W - 1 + ROWS):
        t = first + (r - (W - 1))
        row = tl.load(x_col + t * (stride_x_t * UNIT), mask=_both(has_c, (t >= 0) & (t < T)), other=0.0)
        if r < W - 1:
            row = row.to(tl.float32)
            if init_ptr is not None:
                if t < 0:
                    at = b * stride_init_b + c.to(tl.int64) * stride_init_c + (t + (W - 1)) * stride_init_k
                    row = tl.load(init_ptr + at, mask=has_c, other=0.0).to(tl.float32)
        rows = rows + (row,)
    taps = ()
    if PACKED is not None:
        packed = tl.load(weight_ptr + c, mask=has_c, other=0)
        for k in tl.static_range(W):
            taps = taps + ((packed >> (16 * k)).to(tl.int16).to(PACKED, bitcast=True).to(tl.float32),)
    else:
        for k in tl.static_range(W):
            at = c.to(tl.int64) * stride_weight_c + k * stride_weight_k
            taps = taps + (tl.load(weight_ptr + at, mask=has_c, other=0.0).to(tl.float32),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=has_c, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros((BC,), tl.float32)

    for r in tl.static_range(ROWS):
        t = first + r
        acc = bias
        for k in tl.static_range(W):
            acc += rows[r + k].to(tl.float32) * taps[k]
        if SILU:
            acc = silu(acc)
        if mask_ptr is not None:
            acc *= tl.load(mask_ptr + b * stride_mask_b + t * stride_mask_t, mask=t < T, other=0).to(tl.float32)
        tl.store(y_col + t * channels, acc.to(y_ptr.dtype.element_ty), mask=_both(has_c, t < T))

    if final_ptr is not None:
        if first + ROWS >= T:  # the last tokens are in the cache
            for s in tl.static_range(S):
                t = tl.cast(T, tl.int64) - (S - s)
                kept = tl.load(x_col + t * (stride_x_t * UNIT), mask=_both(has_c, t >= 0), other=0.0).to(tl.float32)
                if init_ptr is not None:
                    at = b * stride_init_b + c.to(tl.int64) * stride_init_c + (t + (W - 1)) * stride_init_k
                    before = _both(has_c, (t < 0) & (t + (W - 1) >= 0))
                    kept += tl.load(init_ptr + at, mask=before, other=0.0).to(tl.float32)
                at = b * stride_final_b + c.to(tl.int64) * stride_final_c + s * stride_final_s
                tl.store(final_ptr + at, kept.to(final_ptr.dtype.element_ty), mask=has_c)


_launch_conv = Launcher(_conv_kernel)
_PACKED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    mask: Tensor | None,
    final_states: Tensor | None,
    activation: str | None,
    rows: int | None = None,
) -> Tensor:
    """Launch the convolution; arguments as `fastmamba.ops.causal_conv1d`, already checked.

    `rows` is the number of tokens a program takes; None chooses.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    y = x.new_empty((batch, tokens, channels))
    channel_blocks = -(-channels // _CHANNELS)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if initial_states is not None and initial_states.numel() == 0:  # W = 1 has none
        initial_states = None
    if rows is None:
        rows = 8 if batch * tokens * channel_blocks < 16 * 2048 else 16
    stride_b, stride_t, stride_c = x.stride()
    unit = 16 // x.element_size()
    if stride_b % unit or stride_t % unit:
        unit = 1
    strides = weight.stride()
    packed = None
    if width == 4 and strides == (4, 1) and not weight.data_ptr() % 16:
        packed = _PACKED.get(weight.dtype)
        if packed is not None:
            weight = weight.view(torch.int64)
    _launch_conv(
        (-(-tokens // rows) * channel_blocks, batch, 1),
        (x, weight, None if bias is None else bias.contiguous(), initial_states, mask, final_states, y),
        (
            tokens,
            channels,
            channel_blocks,
            stride_b // unit,
            stride_t // unit,
            stride_c,
            *strides,
            *((0, 0, 0) if initial_states is None else initial_states.stride()),
            *((0, 0) if mask is None else mask.stride()),
            *((0, 0, 0) if final_states is None else final_states.stride()),
        ),
        (
            width,
            0 if final_states is None else final_states.shape[2],
            activation is not None,
            rows,
            _CHANNELS,
            channels % _CHANNELS == 0,
            unit,
            packed,
        ),
        num_warps=_CHANNELS // 256,
    )
    return y


@triton.jit
def _conv_update_kernel(
    x_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    channels,
    stride_x_b,
    stride_x_c,
    stride_s_b,
    stride_s_c,
    stride_s_w,
    S: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = tl.arange(0, BS)
    has_c = c < channels
    x = tl.load(x_ptr + b * stride_x_b + c * stride_x_c, mask=has_c, other=0.0)
    at = state_ptr + b * stride_s_b + c[:, None] * stride_s_c + s[None, :] * stride_s_w  # [C, S]
    # slot s takes what slot s + 1 held; the last one takes x
    moved = tl.load(at + stride_s_w, mask=has_c[:, None] & (s < S - 1)[None, :], other=0.0)
    moved = tl.where((s == S - 1)[None, :], x[:, None].to(moved.dtype), moved)
    tap_at = s - (S - W)
    if S >= W:
        tap = tl.load(
            weight_ptr + c[:, None] * W + tap_at[None, :],
            mask=has_c[:, None] & ((tap_at >= 0) & (tap_at < W))[None, :],
            other=0.0,
        )
        acc = tl.sum(tl.where((s == S - 1)[None, :], x[:, None].to(tl.float32), moved.to(tl.float32)) * tap, axis=1)
    else:  # S == W - 1: the oldest input is about to leave the state
        oldest = tl.load(state_ptr + b * stride_s_b + c * stride_s_c, mask=has_c, other=0.0).to(tl.float32)
        tap = tl.load(weight_ptr + c[:, None] * W + tap_at[None, :], mask=has_c[:, None] & (s < S)[None, :], other=0.0)
        acc = tl.sum(tl.where((s == S - 1)[None, :], x[:, None].to(tl.float32), moved.to(tl.float32)) * tap, axis=1)
        acc += oldest * tl.load(weight_ptr + c * W, mask=has_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=has_c, other=0.0).to(tl.float32)
    if SILU:
        acc = acc * tl.sigmoid(acc)
    tl.debug_barrier()  # every slot is read before any is written
    tl.store(at, moved, mask=has_c[:, None] & (s < S)[None, :])
    tl.store(y_ptr + b * channels + c, acc.to(y_ptr.dtype.element_ty), mask=has_c)


_launch_update = Launcher(_conv_update_kernel)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Launch the one-token step; arguments as `fastmamba.ops.causal_conv1d_update`, already checked."""
    batch, channels = x.shape
    width, slots = weight.shape[1], conv_state.shape[2]
    y = x.new_empty((batch, channels))
    block = 128
    _launch_update(
        (-(-channels // block), batch, 1),
        (x, conv_state, weight.contiguous(), None if bias is None else bias.contiguous(), y),
        (channels, *x.stride(), *conv_state.stride()),
        (slots, width, activation is not None, 1 << (slots - 1).bit_length(), block),
        num_warps=4,
    )
    return y
