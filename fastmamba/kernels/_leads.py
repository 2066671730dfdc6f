"""The launches before a long SSD on Hopper: how many of the first chunks leaders walk of each head, and how all decay.

The SSD waits for both. So leads are dealt out by one block of few instructions, for these come from memory, too; and
where decays take longer than that, they have a launch of their own, which ends at once where nothing is left out.
(Blocks of the SSD that find out by themselves, each for its heads, read dt in pieces of two bytes: 222 us for 174.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastmamba.kernels._dealt import Steps, needs, store_falls, tiles
from fastmamba.kernels._dot import INTERPRETED
from fastmamba.kernels._launch import Launcher
from fastmamba.ssd_plan import MOST_UNITS, Plan

_PIECES = tl.constexpr(MOST_UNITS)
_LEVELS = tl.constexpr(64)  # times that blocks may take, to choose from
_ALL = tl.constexpr(32767)  # more chunks than any part of a first pass has
_APART = 512
"""Chunks from which on decays have a launch of their own, which ends at once where nothing is left out."""


_COUNTS = [
    "batch", "decays", "H", "T", "chunks", "slots", "segments", "leaders", "unit", "most", "lead",
    "slices_per_group", "per_group", "stride_dt_b",
]  # fmt: skip
"""Not strides of tokens and heads: what they are multiples of says how much a thread may load at once."""


@triton.jit(do_not_specialize=_COUNTS)
def _falls_kernel(
    falls_ptr, dt_ptr, A_ptr, bias_ptr, leads_ptr, H, T, chunks, slots, stride_dt_b, stride_dt_t,
    stride_dt_h, dt_min, dt_max, SOFTPLUS: tl.constexpr, CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """log2 of the decays over each chunk [b, H, chunks], where any is left out: a tile of sequence b."""
    if not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    leads = tl.load(leads_ptr + b * slots + slot, mask=slot < slots, other=_ALL << 16)
    if tl.min(leads >> 16, axis=0) < _ALL:
        store_falls(falls_ptr, dt_ptr, A_ptr, bias_ptr, b, tl.program_id(0), chunks, T, H, stride_dt_b, stride_dt_t,
                    stride_dt_h, dt_min, dt_max, SOFTPLUS, CLAMP, LOG_A, Q)  # fmt: skip


@triton.jit
def _wanted(level, fast, slow, k, k_slow, part):
    """Pieces that leaders have to walk of slots so that their other blocks end by times `level`."""
    return tl.maximum(tl.minimum(fast - k * level, slow - k_slow * level) * part + 0.999, 0.0).to(tl.int32)


@triton.jit
def _deal(
    leads_ptr,  # at the sequence
    pieces_ptr,  # at the sequence
    dt_ptr,  # at the sequence
    A_ptr, bias_ptr, T, chunks, slots, segments, leaders, unit, most, lead, slices_per_group, per_group, stride_dt_t,
    stride_dt_h, first, handover, worth, dt_min, dt_max, SLICES: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr, SLOTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Leads [slots] so that all blocks end soonest, and the leaders' pieces [leaders, _PIECES]."""
    slot = tl.arange(0, SLOTS)
    there = slot < slots
    needed = needs(
        dt_ptr, A_ptr, bias_ptr, slot, slots, T, slices_per_group, per_group, stride_dt_t, stride_dt_h, dt_min, dt_max,
        SLICES, 2, SOFTPLUS, CLAMP, LOG_A, Q,
    )  # fmt: skip
    # The slowest first, to all leaders, then the next ones: of each round all have as long a lead, so that leaders
    # walk as much. Bits of floats that are not negative are in their order; the last ones are the slot's.
    order = tl.where(there, needed.to(tl.int32, bitcast=True) & -SLOTS | (SLOTS - 1 - slot), -1 - slot)
    rank = tl.sum((order[None, :] > order[:, None]).to(tl.int32), axis=1)
    own = ((rank.to(tl.float32) + 0.5) / leaders.to(tl.float32)).to(tl.int32)
    leader = rank - own * leaders
    round = tl.arange(0, ROUNDS)
    slowest = tl.max(tl.where(there[:, None] & (own[:, None] == round[None, :]), needed[:, None], -1e9), axis=0)
    # A block takes handover + first * the smaller of (n (k - 1) + lead) / k^2 and 2 needed, and then (n - lead) / k:
    # `fast` and `slow`, less k and k_slow times what it may take, are the lead that takes it.
    n = chunks.to(tl.float32)
    k = segments.to(tl.float32)
    whole = n + k * handover
    lasts = k / (k - first)
    k_slow = k * lasts
    fast = whole + k * (2.0 * first) * slowest
    slow = lasts * (whole + first * n * (k - 1.0) / k)
    part = 1.0 / unit.to(tl.float32)
    # Times from what a block takes with the longest lead and no first pass to what it does without a lead.
    shortest = (n - most) / k
    step = (first * n / k + handover + most / k) * (1.0 / _LEVELS)
    least = (round == 0).to(tl.int32)  # no leader is without pieces
    level = (shortest + step * (tl.arange(0, _LEVELS) + 1).to(tl.float32))[None, :]
    wanted = tl.maximum(_wanted(level, fast[:, None], slow, k, k_slow, part), least[:, None]) * unit
    walked = tl.sum(tl.where(wanted > most, 1 << 20, wanted), axis=0)  # by each leader
    late = tl.sum((tl.expand_dims(walked, 0) > level).to(tl.int32), axis=1)
    end = shortest + step + step * tl.max(late, axis=0)
    # Blocks of different leads are out of step, and so slower. Where too little is gained all have the same, and all
    # of their first passes.
    alike = end > worth
    wanted = tl.where(alike, lead // unit, _wanted(end, fast, slow, k, k_slow, part))
    wanted = tl.minimum(tl.maximum(wanted, least), most // unit)
    place = tl.sum(tl.where(round[None, :] < round[:, None], wanted[None, :], 0), axis=1)
    place = tl.minimum(place, _PIECES - 2)
    wanted = tl.minimum(wanted, _PIECES - 2 - place)
    both = tl.sum(tl.where(own[:, None] == round[None, :], (wanted | place << 16)[None, :], 0), axis=1)
    both = tl.expand_dims(both, 1)
    wanted = both & 0xFFFF
    needed = tl.where(alike, _ALL, tl.minimum(needed + 1.0, _ALL).to(tl.int32))
    slot = slot[:, None]
    there = there[:, None]
    tl.store(leads_ptr + slot, wanted * unit | needed[:, None] << 16, mask=there)
    entry = tl.arange(0, _PIECES)[None, :]
    piece = tl.where(there, entry - (both >> 16), -1)
    inside = piece < wanted
    last = (rank + leaders >= slots)[:, None]  # of a leader: what follows is empty
    at = pieces_ptr + (leader * _PIECES)[:, None] + entry
    tl.store(at, tl.where(inside, slot | piece << 16, -1), mask=(piece >= 0) & (inside | last))


@triton.jit(do_not_specialize=_COUNTS)
def _deal_kernel(
    dt_ptr, A_ptr, bias_ptr, leads_ptr, pieces_ptr, falls_ptr, batch,
    decays,  # tiles of each sequence
    H, T, chunks, slots, segments, leaders, unit, most, lead, slices_per_group, per_group, stride_dt_b, stride_dt_t,
    stride_dt_h, first, handover, worth, dt_min, dt_max, SLICES: tl.constexpr, SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr, LOG_A: tl.constexpr, Q: tl.constexpr, SLOTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    if not INTERPRETED:
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program < batch:  # the longest first
        b = program.to(tl.int64)
        _deal(leads_ptr + b * slots, pieces_ptr + b * leaders * _PIECES, dt_ptr + b * stride_dt_b, A_ptr, bias_ptr, T,
              chunks, slots, segments, leaders, unit, most, lead, slices_per_group, per_group, stride_dt_t, stride_dt_h,
              first, handover, worth, dt_min, dt_max, SLICES, SOFTPLUS, CLAMP, LOG_A, Q, SLOTS, ROUNDS)  # fmt: skip
    elif falls_ptr is not None:
        tile = program - batch
        b = (tile // decays).to(tl.int64)
        store_falls(falls_ptr, dt_ptr, A_ptr, bias_ptr, b, tile % decays, chunks, T, H, stride_dt_b, stride_dt_t,
                    stride_dt_h, dt_min, dt_max, SOFTPLUS, CLAMP, LOG_A, Q)  # fmt: skip


_launch = Launcher(_deal_kernel)
_launch_falls = Launcher(_falls_kernel)


class Leads(NamedTuple):
    """What is in memory once the launches are through."""

    falls: Tensor
    """(B, H, chunks) in float32: log2 of the decay over each chunk; anything where nothing is left out."""
    leads: Tensor
    """(B, slots), int32: how many chunks leaders walk of each slot, a multiple of `Plan.unit` and at most `Plan.most`.

    And 2**16 times after how many chunks nothing is left of either head, by an estimate; at most 32767. Slot s has the
    two slices that block s of a segment has.
    """
    pieces: Tensor
    """(B, leaders, MOST_UNITS), int32: what leaders walk, `Plan.unit` chunks at a time, one at least and two less than
    there are places at most: slot + 2**16 * the how manieth of that slot's, then -1."""


def deal_leads(
    plan: Plan,
    steps: Steps,
    *,
    chunk: int,
    slices: int,
    slices_per_group: int,
    slots: int,
) -> Leads:
    """Work out how chunks decay, and deal first chunks out to leaders so that all blocks of an SSD end soonest.

    By an estimate of how fast heads decay, from tokens drawn evenly. What is dealt out decides how results are rounded,
    and the time that the SSD takes, but nothing else.

    Args:
        plan: with leads to deal out.
        steps: dt, A and what becomes of them.
        chunk: tokens of a chunk.
        slices: of a head.
        slices_per_group, slots: of all heads of a group, and of a sequence.
    """
    dt = steps.dt
    batch, tokens, heads = dt.shape
    chunks = -(-tokens // chunk)
    found = Leads(
        dt.new_empty((batch, heads, chunks), dtype=torch.float32),
        dt.new_empty((batch, slots), dtype=torch.int32),
        dt.new_empty((batch, plan.leaders, MOST_UNITS), dtype=torch.int32),
    )
    decays = tiles(chunks, heads)
    together = chunks < _APART
    numbers = (batch, decays, heads, tokens, chunks, slots, plan.segments, plan.leaders, plan.unit, plan.most)
    numbers += (plan.lead, slices_per_group, plan.blocks_per_group, *dt.stride(), plan.first, plan.handover, plan.worth)
    limits = steps.dt_min, steps.dt_max
    power = triton.next_power_of_2
    form = (steps.softplus, steps.clamped, steps.log_A, chunk, max(16, power(slots)))
    tensors = (dt, steps.A, steps.bias, found.leads, found.pieces, found.falls if together else None)
    programs = batch * (1 + decays) if together else batch
    rounds = power(-(-slots // plan.leaders))
    _launch((programs, 1, 1), tensors, (*numbers, *limits), (slices, *form, rounds), num_warps=16)
    if not together:
        numbers = (heads, tokens, chunks, slots, *dt.stride(), *limits)
        tensors = (found.falls, dt, steps.A, steps.bias, found.leads)
        _launch_falls((decays, batch, 1), tensors, numbers, form, num_warps=16, launch_pdl=True)
    return found
