"""A copy of channel-major activations, as F.conv1d leaves them, with the channels of a token side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher, unit_stride

_TOKENS, _CHANNELS = 128, 64  # of one program: whole cache lines both ways


@triton.jit
def _transpose_kernel(
    x_ptr,
    y_ptr,
    T,
    channels,
    channel_blocks,
    stride_x_b,
    stride_x_c,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    c = ((block % channel_blocks) * BC + tl.arange(0, BC)).to(tl.int64)
    t = (block // channel_blocks).to(tl.int64) * BT + tl.arange(0, BT)
    inside = (t < T)[:, None] & (c < channels)[None, :]  # [T, C]
    x = tl.load(x_ptr + b * stride_x_b + c[None, :] * stride_x_c + t[:, None], mask=inside)
    tl.store(y_ptr + (b * T + t[:, None]) * channels + c[None, :], x, mask=inside)


_launch = Launcher(_transpose_kernel)


def token_major(x: Tensor) -> Tensor:
    """x (B, T, H, P) itself where its channels are side by side, else a contiguous copy."""
    if x.stride(3) == 1:
        return x
    batch, tokens, heads, width = x.shape
    stride_b, stride_t, stride_h, stride_c = x.stride()
    if stride_t != 1 or (heads > 1 and stride_h != width * stride_c):
        return unit_stride(x)
    y = x.new_empty(x.shape)
    channels = heads * width
    channel_blocks = -(-channels // _CHANNELS)
    _launch(
        (-(-tokens // _TOKENS) * channel_blocks, batch, 1),
        (x, y),
        (tokens, channels, channel_blocks, stride_b, stride_c),
        (_TOKENS, _CHANNELS),
        num_warps=4,
    )
    return y
