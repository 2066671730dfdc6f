"""What heads' decays leave to be done, worked out before the SSD: which of its blocks walks what.

A head that decays fast needs next to no first pass, a slow one all of it. So that blocks end together, slow heads'
sequences are cut into more segments. The rates are estimates, of tokens drawn evenly from the sequence: only the time
that a call takes depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._softplus import softplus_by_series
from fastmamba.ssd_plan import MOST_DEALT

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-32.0)
"""log2 of a decay that leaves nothing of what was before: 2 ** 8 below what float32 rounds off of anything like it."""
MOST = tl.constexpr(MOST_DEALT)
"""Segments of a sequence at most."""
SAMPLES = tl.constexpr(32)
"""Tokens that a head's rate is estimated from."""
STEPS = tl.constexpr(12)
"""Bisections of the time that all blocks may take."""
CHUNKS = tl.constexpr(4)
HEADS = tl.constexpr(16)
"""Of a tile, whose decays a program works out: a token's time steps of so many heads are what memory gives at once."""


class Steps(NamedTuple):
    """How time steps and decays are given, as `fastmamba.ops.ssd` takes them."""

    dt: Tensor
    """(B, T, H)."""
    A: Tensor
    """(H,) in float32, contiguous."""
    bias: Tensor | None
    """(H,), contiguous."""
    softplus: bool
    dt_min: float
    dt_max: float
    log_A: bool

    @property
    def clamped(self) -> bool:
        """Whether time steps are held to a range: what softplus gives is not negative."""
        return self.dt_min > 0.0 or self.dt_max != float("inf") or not self.softplus


@dataclass(frozen=True)
class Slots:
    """Who shares blocks: `slices` of each head's channels, `block_slices` of a group's to a slot.

    Slot s of a sequence has the slices from `s // per_group * slices_per_group + s % per_group * block_slices` on.
    """

    slots: int
    """Of a sequence, of all groups."""
    slices: int
    slices_per_group: int
    per_group: int
    block_slices: int


@dataclass(frozen=True)
class Costs:
    """Of blocks, in chunks of a second pass."""

    first: float
    """A chunk of the first pass."""
    start: float
    """Before and between both passes, where next to nothing is left of what was before a segment."""
    handover: float
    """What states that are handed on take besides."""
    wait: float = 0.0
    """And for each segment of the sequence."""


@triton.jit
def step_of(dt, bias, dt_min, dt_max, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr):
    """The time step in float32, as the SSD takes it."""
    dt = dt.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus_by_series(dt)
    if CLAMP:
        dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
    return dt


@triton.jit
def _factor(A_ptr, head, there, LOG_A: tl.constexpr):
    """A * log2(e) of heads, zero for those that are not there."""
    A = tl.load(A_ptr + head, mask=there, other=0.0).to(tl.float32)
    if LOG_A:
        A = -tl.exp(A)
    return tl.where(there, A * LOG2E, 0.0)


def tiles(chunks: int, heads: int) -> int:
    """How many a sequence's decays have."""
    return -(-chunks // CHUNKS.value) * -(-heads // HEADS.value)


@triton.jit
def store_falls(
    falls_ptr, dt_ptr, A_ptr, bias_ptr, b, tile, chunks, T, H, stride_dt_b, stride_dt_t, stride_dt_h, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """log2 of the decays over each chunk, of a tile of sequence b; [b, H, chunks] in float32."""
    parts = (H + HEADS - 1) // HEADS
    c = tile // parts * CHUNKS
    head = tile % parts * HEADS + tl.arange(0, HEADS)
    there = head < H
    t = c * Q + tl.arange(0, CHUNKS * Q)
    at = dt_ptr + b * stride_dt_b + t.to(tl.int64)[:, None] * stride_dt_t + head[None, :] * stride_dt_h
    inside = (t < T)[:, None] & there[None, :]
    dt = tl.load(at, mask=inside, other=0.0)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head, mask=there, other=0.0).to(tl.float32)[None, :]
    dt = tl.where(inside, step_of(dt, bias, dt_min, dt_max, SOFTPLUS, CLAMP), 0.0)
    fall = tl.sum(tl.reshape(dt, [CHUNKS, Q, HEADS]), axis=1) * _factor(A_ptr, head, there, LOG_A)[None, :]
    chunk = c + tl.arange(0, CHUNKS)
    at = falls_ptr + (b * H + head)[None, :] * chunks + chunk[:, None]
    tl.store(at, fall, mask=there[None, :] & (chunk < chunks)[:, None])


@triton.jit
def after_chunks(
    dt_ptr, A_ptr, bias_ptr, head, there, T, stride_dt_t, stride_dt_h, dt_min, dt_max, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """After how many chunks nothing is left of heads [n], by an estimate; at most 1e6. `dt_ptr` is at the sequence."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + head, mask=there, other=0.0).to(tl.float32)[None, :]
    # All at once: memory takes as long for one of them.
    t = ((2 * tl.arange(0, SAMPLES) + 1) * (T // (2 * SAMPLES))).to(tl.int64)
    dt = tl.load(dt_ptr + t[:, None] * stride_dt_t + head[None, :] * stride_dt_h, mask=there[None, :], other=0.0)
    total = tl.sum(step_of(dt, bias, dt_min, dt_max, SOFTPLUS, CLAMP), axis=0)
    fall = total * _factor(A_ptr, head, there, LOG_A) * (Q / SAMPLES)
    # What does not decay, or is not a number, is taken to last.
    return NOTHING / tl.where(fall < NOTHING * 1e-6, fall, NOTHING * 1e-6)


@triton.jit
def needs(
    dt_ptr, A_ptr, bias_ptr, slot, slots, T, slices_per_group, per_group, stride_dt_t, stride_dt_h, dt_min, dt_max,
    SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOG_A: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """`after_chunks` of slots [n], as `Slots` says who they are: of the slowest of their heads."""
    there = slot < slots
    if SLICES == BLOCK_SLICES:
        head = slot
    else:
        within = slot % per_group * BLOCK_SLICES
        of_group = slot // per_group * slices_per_group
        head = (of_group + within) // SLICES
    needed = after_chunks(
        dt_ptr, A_ptr, bias_ptr, head, there, T, stride_dt_t, stride_dt_h, dt_min, dt_max, SOFTPLUS, CLAMP, LOG_A, Q
    )
    if BLOCK_SLICES == 2 and SLICES % 2 == 1:  # two heads; of an odd number of slices, the last one is alone
        head = (of_group + tl.minimum(within + 1, slices_per_group - 1)) // SLICES
        other = after_chunks(
            dt_ptr, A_ptr, bias_ptr, head, there, T, stride_dt_t, stride_dt_h, dt_min, dt_max, SOFTPLUS, CLAMP, LOG_A, Q
        )
        needed = tl.maximum(needed, other)
    return needed


@triton.jit
def _times(needed, k, chunks, first, start, handover, wait, SHARED: tl.constexpr):
    """What the slowest of k segments' blocks takes, in chunks of a second pass.

    SHARED: what the last segment adds nobody needs, and all blocks share the others' first passes.
    """
    each = chunks / k
    summed = each * (k - 1.0) / k if SHARED else each
    alone = needed < each / k if SHARED else needed < each
    # Decays come for a few chunks at a time, which all count then.
    walked = first * tl.minimum(needed + 2.0, summed) + each
    walked += start + tl.where(alone, 0.0, handover + wait * k)
    return tl.where(k > 1.0, tl.minimum(walked, chunks), chunks)  # as one segment, where two are slower


@triton.jit
def deal(
    dealt_ptr,  # at the sequence
    dt_ptr,  # at the sequence
    A_ptr, bias_ptr, T, chunks, slots, blocks, slices_per_group, per_group, first, start, handover, wait, stride_dt_t,
    stride_dt_h, dt_min, dt_max, SLICES: tl.constexpr, BLOCK_SLICES: tl.constexpr, SHARED: tl.constexpr,
    SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr, SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Cut the sequences of `slots` into as many segments as make `blocks` of them end soonest; leave who walks what.

    For each block slot + 2**16 * segment + 2**24 * segments of that slot, all segments of a number before those of the
    next, or -1. SLOTS and BLOCKS are the next powers of two; `blocks` has to be `slots` or more.
    """
    slot = tl.arange(0, SLOTS)
    needed = needs(
        dt_ptr, A_ptr, bias_ptr, slot, slots, T, slices_per_group, per_group, stride_dt_t, stride_dt_h, dt_min, dt_max,
        SLICES, BLOCK_SLICES, SOFTPLUS, CLAMP, LOG_A, Q,
    )  # fmt: skip
    n = chunks.to(tl.float32)
    place = tl.arange(0, MOST)
    k = (place + 1).to(tl.float32)[None, :]
    times = tl.where(place[None, :] < chunks, _times(needed[:, None], k, n, first, start, handover, wait, SHARED), n)
    # More segments than end soonest gain nothing: they are taken to end as soon.
    least = tl.expand_dims(tl.min(times, axis=1), 1)
    soonest = tl.expand_dims(tl.min(tl.where(times <= least, place[None, :], MOST), axis=1), 1)
    there = (slot < slots)[:, None]
    times = tl.where(there & (place[None, :] < soonest), times, 0.0)
    low = tl.max(tl.reshape(tl.where(there, least, 0.0), [SLOTS]), axis=0)
    high = n  # as slots of one segment take
    for _ in range(STEPS):
        middle = (low + high) * 0.5
        fits = tl.sum(tl.reshape((times > middle).to(tl.int32), [SLOTS * MOST]), axis=0) <= blocks - slots
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    segments = tl.where(slot < slots, tl.sum((times > high).to(tl.int32), axis=1) + 1, 0)
    there = place[None, :] < segments[:, None]
    count = tl.sum(there.to(tl.int32), axis=0)
    before = tl.cumsum(count, axis=0) - count
    rank = tl.cumsum(there.to(tl.int32), axis=0) - 1
    entry = slot[:, None] | place[None, :] << 16 | segments[:, None] << 24
    tl.store(dealt_ptr + before[None, :] + rank, entry, mask=there)
    block = tl.arange(0, BLOCKS)
    tl.store(
        dealt_ptr + block, tl.full([BLOCKS], -1, tl.int32), mask=(block >= tl.sum(count, axis=0)) & (block < blocks)
    )
