"""How the Hopper SSD divides a call among blocks: worked out on the host, once for a shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

GROUP = 4
"""Chunks whose decays are worked out at a time."""
SPAN = 16
"""Segments, of which the last one hands on a whole state, the others what they add to it."""
MOST_DEALT = 16
"""Segments of a slice, where they are dealt out."""
MOST_PIECES = 32
"""Places for what a leader's warps look up of its pieces, two of them for what lies past the last."""
MOST_UNITS = 64
"""The same where leads are dealt out by head, in smaller pieces."""


@dataclass(frozen=True)
class Plan:
    """Segments of a sequence, and who walks what of them."""

    blocks_per_group: int
    """Of a segment."""
    segments: int
    per_segment: int
    """Chunks of a segment; the last one takes what is left."""
    more: int = 0
    """How many more chunks the first segment has."""
    share: float = 0.0
    """How many groups of chunks earlier, before its segment, a block's first pass begins than that of the one before.

    So all blocks have as much to sum up, for what the last segment adds to the state nobody needs.
    """
    leaders: int = 0
    """Blocks of a sequence that walk its first chunks, which are in no segment.

    The state there is known. So a leader waits for nobody and has no first pass, and takes the first chunks of several
    blocks' slices, one after the other, on a multiprocessor that would be idle.
    """
    pieces: int = 1
    """Of how many blocks' slices a leader walks the first chunks, at most."""
    lead: int = 0
    """How many chunks those are: a multiple of GROUP."""
    dealt: int = 0
    """Blocks of a sequence whose segments a launch before deals out by how fast heads decay; 0: segments are equal.

    `segments` is then how many a slice may have at most.
    """
    unit: int = 0
    """Where leads are dealt out by head on the device, how many chunks a leader's piece has; a lead is some of them."""
    most: int = 0
    """The longest lead then."""
    first: float = 0.0
    """A chunk of the first pass, in chunks of a second one."""
    handover: float = 0.0
    """Handing states on, in the same."""
    worth: float = 0.0
    """What blocks may take at most with different leads, in the same; else all get about `lead`."""

    def ahead(self, segment: int, step: int) -> int:
        """How many chunks before its segment a block begins its first pass, in steps of so many.

        As the kernels round in float32, or one step more where that may go either way.
        """
        return int(segment * self.share * (GROUP // step) + ((self.lead + self.more) / step + 0.501)) * step


@dataclass(frozen=True)
class _Pace:
    """What blocks take on an H200, in chunks of a second pass."""

    first: float
    """A chunk of the first pass."""
    handover: float
    """Handing states on, with all that is waited for."""

    def walk(self, segments: int, chunks: int, lead: float) -> float:
        """Of a segment, both passes."""
        walked = (chunks - lead) / segments
        return self.first * (lead + (segments - 1) * walked) / segments + self.handover + walked

    def lead(self, segments: int, chunks: int, pieces: float) -> float:
        """How many chunks of so many pieces leaders walk meanwhile."""
        whole = self.walk(segments, chunks, 0)
        return whole / (pieces + whole - self.walk(segments, chunks, 1))


# 1,100 of 2,460 clocks, one head to a block, or of 2,910, two heads; a lone slice 750 of 1,500; of 4,500 with a gate.
# Handing on takes 15,000; with a gate leaders were late by that.
_NARROW = {1: _Pace(first=0.5, handover=8.0), 2: _Pace(first=0.42, handover=5.5)}
_GATED = {1: _Pace(first=0.35, handover=4.0), 2: _Pace(first=0.28, handover=1.0)}
_DEALT = 340
"""Chunks of a segment from which on leads are dealt out by head: below, the launch before takes what that gains."""
_DEALT_LAUNCH = 5.0
"""What that launch takes, in chunks of a second pass."""
_DEALT_SLOW = 1 / 3
"""Of heads, those that decay so slowly that leads are for them, as Mamba-2 initialises dt and A."""
_DEALT_SOON = 0.95
"""Where a block's two slices are of one head, leads are dealt out in shorter segments, too, if with so many slow heads
blocks take less than that, launch and all, of what they take with the same leads. (Of two heads that was no faster.)"""
_DEALT_MOST = 1 << 15
"""Chunks of a sequence, which are counted in 15 bits."""
_DEALT_SEGMENTS = 3
"""At most, with leads that are dealt out: a lead is no longer than a segment, and too short in more of them."""
_DEALT_WORTH = 0.93
"""What blocks may take at most with different leads, of what they take with the same: they are slower out of step."""
_WIDE_LEAST = 128
"""Chunks of states of 256, from which on segments are dealt out: 64 were 5% to 10% slower that way."""


def _share(segments: int, chunks: int, slices: int, more: int = 0) -> float:
    """`Plan.share` of segments without leaders, the first of which has `more` chunks than the others.

    Two slices keep what they have summed up for themselves in memory: only where a segment has a group for each. One
    slice has registers for it, unless segments hand on whole states, and shares chunk by chunk: from three groups on.
    """
    pays = chunks > 2 * GROUP and segments <= SPAN if slices == 1 else chunks >= GROUP * segments
    return (chunks - more) / (GROUP * segments) if pays else 0.0


def _more(segments: int, chunks: int) -> int:
    """How many more chunks the first segment gets, in states of 256: it waits for nobody and reads nothing.

    Where the first pass is shared, which makes up for it.
    """
    return 0 if segments == 1 or chunks < GROUP * segments else 4


def _led(plan: Plan, slices: int, blocks: int, chunks: int, idle: int, pace: _Pace) -> Plan:
    """The plan with leaders on so many idle multiprocessors; `blocks` are those of a segment.

    As many chunks as leaders walk while the others do both passes, and as few leaders as that takes.
    """
    segments = plan.segments
    if segments == 1 or idle < 1 or slices == 1 and segments > SPAN:
        return plan
    pieces = -(-blocks // min(idle, blocks))
    if pieces > MOST_PIECES - 2:
        return plan
    step = 1 if slices == 1 else GROUP
    most = int(min(pace.lead(segments, chunks, pieces), chunks / (segments + 1)))
    for lead in range(most // GROUP * GROUP, 0, -GROUP):
        led = _with_lead(plan, chunks, lead)
        led = replace(led, leaders=-(-blocks // pieces), pieces=pieces)
        if _possible(led, chunks, step):
            return led
    return plan


def _with_lead(plan: Plan, chunks: int, lead: int) -> Plan:
    """The plan's segments, behind so many chunks of leaders."""
    per = -(-(chunks - lead) // plan.segments)
    return replace(plan, per_segment=per, more=0, share=(per - lead) / (GROUP * plan.segments), lead=lead)


def _possible(plan: Plan, chunks: int, step: int) -> bool:
    """Whether no segment is without chunks, and each block's first pass reaches its segment."""
    reached = all(plan.ahead(s, step) <= plan.per_segment for s in range(1, plan.segments))
    return chunks - plan.lead > (plan.segments - 1) * plan.per_segment and reached


def _dealt(plan: Plan, blocks: int, chunks: int, idle: int, pace: _Pace, one_head: bool) -> Plan:
    """The plan with leads dealt out by head, where a sequence is long enough for that to pay.

    To so many idle multiprocessors, or as many as there are `blocks` of a segment.
    """
    segments, leaders = plan.segments, min(idle, blocks)
    if plan.lead == 0 or segments > _DEALT_SEGMENTS or chunks >= _DEALT_MOST:
        return plan
    unit = -(-int(pace.walk(segments, chunks, 0)) // ((MOST_UNITS - 2) * GROUP)) * GROUP
    most = 0
    while most + unit <= chunks / (segments + 1) and _possible(_with_lead(plan, chunks, most + unit), chunks, GROUP):
        most += unit
    alike = pace.walk(segments, chunks, plan.lead)
    typical = pace.walk(segments, chunks, min(most, pace.lead(segments, chunks, _DEALT_SLOW * blocks / leaders)))
    soon = one_head and typical + _DEALT_LAUNCH < _DEALT_SOON * alike
    if most == 0 or not (soon or chunks >= _DEALT * segments):
        return plan
    worth = _DEALT_WORTH * alike
    return replace(plan, leaders=leaders, unit=unit, most=most, first=pace.first, handover=pace.handover, worth=worth)


@functools.lru_cache(maxsize=512)
def plan(
    batch: int,
    groups: int,
    slices: int,
    chunks: int,
    segments: int,
    block_slices: int,
    multiprocessors: int,
    *,
    wide: bool = False,
    gated: bool = False,
    one_head: bool = False,
    deal: bool = True,
) -> Plan:
    """How to divide `slices` of each group in `chunks` into `segments` at most, for blocks of `block_slices`.

    `wide` says that states have more than 128 channels, `one_head` that the two slices of each block are of one head,
    `deal` that leads may be dealt out by head.
    """
    blocks_per_group = -(-slices // block_slices)
    segments = min(segments, chunks)
    blocks = groups * blocks_per_group
    if wide and segments > 1 and chunks >= _WIDE_LEAST and batch * blocks * segments <= multiprocessors:
        available = multiprocessors // batch
        return Plan(blocks_per_group, min(MOST_DEALT, available - blocks + 1), 0, dealt=available)
    # Equal ones, and equal parts of what the first pass sums up: all blocks wait until all are through with that.
    per_segment = -(-chunks // segments)
    segments = -(-chunks // per_segment)
    more = _more(segments, per_segment) if wide else 0
    per_segment = -(-(chunks - more) // segments)
    share = _share(segments, per_segment, block_slices, more)
    found = Plan(blocks_per_group, segments, per_segment, more, share)
    idle = multiprocessors // batch - blocks * segments
    if wide:
        return found
    pace = (_GATED if gated else _NARROW)[block_slices]
    led = _led(found, block_slices, blocks, chunks, idle, pace)
    return led if block_slices == 1 or gated or not deal else _dealt(led, blocks, chunks, idle, pace, one_head)


def scorers(batch: int, groups: int, plan: Plan, multiprocessors: int) -> int:
    """How many blocks to add to each segment that work out its C B^T while the others are at their first pass.

    As many as multiprocessors are left for. 0 is a launch of its own before this one; so it is where there are several
    groups, each of which has scores.
    """
    if groups > 1:
        return 0
    idle = multiprocessors - batch * plan.blocks_per_group * plan.segments
    return max(0, min(idle // (batch * plan.segments), plan.per_segment))
