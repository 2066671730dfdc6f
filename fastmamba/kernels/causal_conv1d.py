"""Depthwise causal convolution with SiLU, token-major, and its one-token step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher

_TOKENS = 32
_CHANNELS = 128


@triton.jit
def _conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    init_ptr,
    mask_ptr,
    y_ptr,
    T,
    channels,
    channel_blocks,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_init_b,
    stride_init_c,
    stride_init_w,
    stride_mask_b,
    stride_mask_t,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    c = (block % channel_blocks) * BC + tl.arange(0, BC)
    first = (block // channel_blocks).to(tl.int64) * BT
    row = tl.arange(0, BT)
    t = first + row
    has_c = c < channels
    inside = (t < T)[:, None] & has_c[None, :]

    acc = tl.zeros((BT, BC), dtype=tl.float32)  # [T, C]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=has_c, other=0.0).to(tl.float32)[None, :]
    x_block = x_ptr + b * stride_x_b + first * stride_x_t
    for k in tl.static_range(W):
        back = W - 1 - k
        tap = tl.load(weight_ptr + c * W + k, mask=has_c, other=0.0).to(tl.float32)
        seen = inside & (t >= back)[:, None]
        x = tl.load(x_block + (row - back)[:, None] * stride_x_t + c[None, :] * stride_x_c, mask=seen, other=0.0)
        acc += x.to(tl.float32) * tap[None, :]
        if init_ptr is not None:
            if first < W - 1:
                slot = (t + k).to(tl.int32)  # token t - back sits at W - 1 + (t - back)
                before = inside & (t < back)[:, None]
                at = b * stride_init_b + c[None, :] * stride_init_c + slot[:, None] * stride_init_w
                acc += tl.load(init_ptr + at, mask=before, other=0.0).to(tl.float32) * tap[None, :]
    if SILU:
        acc = acc * tl.sigmoid(acc)
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + b * stride_mask_b + t * stride_mask_t, mask=t < T, other=0)
        acc *= keep.to(tl.float32)[:, None]
    y_block = y_ptr + (b * T + first) * channels
    tl.store(y_block + row[:, None] * channels + c[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


_launch_conv = Launcher(_conv_kernel)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Launch the convolution; arguments as `fastmamba.ops.causal_conv1d`, already checked."""
    batch, tokens, channels = x.shape
    y = x.new_empty((batch, tokens, channels))
    channel_blocks = -(-channels // _CHANNELS)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    if initial_states is not None and initial_states.numel() == 0:  # W = 1 has none
        initial_states = None
    _launch_conv(
        (-(-tokens // _TOKENS) * channel_blocks, batch, 1),
        (x, weight.contiguous(), None if bias is None else bias.contiguous(), initial_states, mask, y),
        (
            tokens,
            channels,
            channel_blocks,
            *x.stride(),
            *((0, 0, 0) if initial_states is None else initial_states.stride()),
            *((0, 0) if mask is None else mask.stride()),
        ),
        (weight.shape[1], activation is not None, _TOKENS, _CHANNELS),
        num_warps=4,
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
