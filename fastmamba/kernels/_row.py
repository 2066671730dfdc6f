"""How a kernel that takes whole rows cuts them."""

from __future__ import annotations

import functools

import triton
import triton.language as tl


@triton.jit
def in_row(start: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Which of the BLOCK channels from `start` on a row of SIZE has; known to the compiler where it is all of them."""
    if start + BLOCK <= SIZE:
        inside = tl.full((BLOCK,), True, tl.int1)
    else:
        inside = start + tl.arange(0, BLOCK) < SIZE
    return inside


@functools.cache
def row_blocks(size: int) -> tuple[int, int]:
    """Channels per block and warps for rows of `size`: 8 channels a thread and block, so 16 bytes of bfloat16.

    Widths of models are seldom powers of two (5120 = 5 * 1024, 1536 = 3 * 512): the largest power of two that divides
    one leaves no thread idle. Where that is small, the last block is partly empty.
    """
    block = size & -size
    if block < 128 or size // block > 16:
        block = 1 << (size - 1).bit_length()
    block = min(max(block, 16), 1024)
    return block, max(block // 256, 1)
