"""The launch before an SSD whose blocks are dealt out by head: who walks what, how chunks decay, and C B^T."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from fastmamba.kernels._dealt import Costs, Slots, Steps, deal, store_falls, tiles
from fastmamba.kernels._dot import INTERPRETED
from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._scores import store_scores

_COUNTS = [
    "T", "chunks", "plans", "decays", "H", "G", "slots", "blocks", "slices_per_group", "per_group", "flags",
    "stride_dt_b",
]  # fmt: skip
"""Not strides of tokens and heads: what they are multiples of says how much a thread may load at once."""


@triton.jit(do_not_specialize=_COUNTS)
def _before_kernel(
    dt_ptr, A_ptr, bias_ptr, dealt_ptr, falls_ptr, flags_ptr, scores_ptr, B_ptr, C_ptr,
    T, chunks,
    plans,  # one of each sequence
    decays,  # tiles of each
    H, G, slots, blocks, slices_per_group, per_group, flags,
    first, start, handover, wait, dt_min, dt_max, stride_dt_b, stride_dt_t, stride_dt_h,
    stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t, stride_C_g,
    SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr, SHARED: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP and not INTERPRETED:
        gdc_launch_dependents()
    # Plans first: they take the longest.
    program = tl.program_id(0)
    if program < plans:
        b = tl.cast(program, tl.int64)
        deal(dealt_ptr + b * blocks, dt_ptr + b * stride_dt_b, A_ptr, bias_ptr, T, chunks, slots, blocks,
             slices_per_group, per_group, first, start, handover, wait, stride_dt_t, stride_dt_h, dt_min, dt_max,
             SLICES, BLOCK_SLICES, SHARED, SOFTPLUS, CLAMP, LOG_A, Q, SLOTS, BLOCKS)  # fmt: skip
        if flags_ptr is not None and program == 0:
            for begin in range(0, flags, 1024):
                flag = begin + tl.arange(0, 1024)
                tl.store(flags_ptr + flag, tl.zeros([1024], tl.int32), mask=flag < flags)
    elif program < plans + plans * decays:
        if falls_ptr is not None:
            tile = program - plans
            b = tl.cast(tile // decays, tl.int64)
            store_falls(falls_ptr, dt_ptr, A_ptr, bias_ptr, b, tile % decays, chunks, T, H, stride_dt_b, stride_dt_t,
                        stride_dt_h, dt_min, dt_max, SOFTPLUS, CLAMP, LOG_A, Q)  # fmt: skip
    elif scores_ptr is not None:
        place = program - plans - plans * decays
        store_scores(scores_ptr, B_ptr, C_ptr, place, chunks, T, G, stride_B_b, stride_B_t, stride_B_g, stride_C_b,
                     stride_C_t, stride_C_g, N, Q, BN, PRECISION)  # fmt: skip


_launch = Launcher(_before_kernel)


class Before(NamedTuple):
    """What is in memory once the launch is through, in the order of blocks; None what was not asked for."""

    dealt: Tensor
    """(B, blocks), int32, as `fastmamba.kernels._dealt.deal` leaves it."""
    falls: Tensor | None
    """(B, H, chunks), float32: log2 of the decay over each chunk."""
    flags: Tensor | None
    """int32 zeros."""
    scores: Tensor | None
    """(B, G, chunks, s, t), float32, as `fastmamba.kernels._scores.chunk_scores` leaves them."""


def before(
    steps: Steps,
    slots: Slots,
    costs: Costs,
    chunk: int,
    blocks: int,
    *,
    groups: int,
    shared: bool,
    falls: bool,
    B: Tensor | None = None,
    C: Tensor | None = None,
    precision: str = "ieee",
    flags: int = 0,
    overlap: bool = False,
) -> Before:
    """Work out before an SSD what its blocks need to know of heads' decays, and C B^T where B and C are given.

    Args:
        steps: dt, A and what becomes of them.
        slots: who shares blocks.
        costs: of a block.
        chunk: tokens of a chunk, a power of two.
        blocks: that are dealt out, of each sequence: as many as there are slots, or more.
        groups: of B and C.
        shared: whether first passes are, as `fastmamba.ssd_plan.Plan.share` says.
        falls: whether the decays of chunks are wanted.
        B, C: (B, T, G, N), the last axis contiguous.
        precision: `input_precision` of their product.
        flags: how many zeros are wanted.
        overlap: let the kernel after this one start at once, if it is launched to; it waits before it reads this one's.
    """
    dt = steps.dt
    batch, tokens, heads = dt.shape
    chunks = -(-tokens // chunk)
    new = dt.new_empty
    dealt = new((batch, blocks), dtype=torch.int32)
    zeros = new(flags, dtype=torch.int32) if flags else None
    fall = scores = None
    if falls:
        fall = new((batch, heads, chunks), dtype=torch.float32)
    width = 16
    strides = (0, 0, 0, 0, 0, 0)
    if B is not None and C is not None:
        width = B.shape[3]
        strides = (*B.stride()[:3], *C.stride()[:3])
        scores = new((batch, groups, chunks, chunk, chunk), dtype=torch.float32)
    decays = tiles(chunks, heads) if falls else 0
    numbers = (
        tokens, chunks, batch, decays, heads, groups, slots.slots, blocks, slots.slices_per_group, slots.per_group,
        flags, costs.first, costs.start, costs.handover, costs.wait, steps.dt_min, steps.dt_max, *dt.stride(), *strides,
    )  # fmt: skip
    power = triton.next_power_of_2
    constants = (
        slots.slices, slots.block_slices, shared, steps.softplus, steps.clamped, steps.log_A, chunk,
        power(slots.slots), power(blocks), width, max(16, power(width)), precision, overlap,
    )  # fmt: skip
    programs = batch * (1 + decays + (0 if scores is None else groups * chunks))
    tensors = (dt, steps.A, steps.bias, dealt, fall, zeros, scores, B, C)
    # An SSD that asks for the decays of chunks has no room beside these: its blocks begin when they are through.
    _launch((programs, 1, 1), tensors, numbers, constants, num_warps=16 if falls else 4)
    return Before(dealt, fall, zeros, scores)
