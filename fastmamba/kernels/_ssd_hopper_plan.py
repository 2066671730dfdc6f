"""How the Hopper SSD divides a call among blocks: worked out on the host, once for a shape."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from fastmamba.kernels import _ssd_hopper_terms as terms

GROUP = terms.GROUP.value
SPAN = terms.SPAN.value


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

    @property
    def first_pass(self) -> float:
        """Chunks of the longest first pass, about: they are shared evenly, or each block sums up its own segment."""
        if self.segments == 1:
            return 0.0
        if self.share == 0.0 and self.leaders == 0:
            return float(self.per_segment + self.more)
        return (self.lead + self.more + (self.segments - 1) * self.per_segment) / self.segments


@dataclass(frozen=True)
class _Pace:
    """What blocks take on an H200, in chunks of a second pass."""

    first: float
    """A chunk of the first pass."""
    handover: float
    """Handing states on, with all that is waited for."""

    def walk(self, plan: Plan) -> float:
        """Of a segment, both passes."""
        return self.first * plan.first_pass + self.handover + plan.per_segment + plan.more


# 1,100 of 2,460 clocks, one head to a block, or of 2,910, two heads; a lone slice 750 of 1,500; states of 256 1,450 of
# 3,100 or of 3,800. Handing on takes 15,000.
_NARROW = {1: _Pace(first=0.5, handover=8.0), 2: _Pace(first=0.42, handover=5.5)}
_WIDE = _Pace(first=0.42, handover=4.5)


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
    """The plan with leaders on so many multiprocessors, where that is faster.

    `blocks` are those of a segment. As many chunks as leaders walk while the others do both passes, and as few leaders
    as that takes.
    """
    if plan.segments == 1 or idle < 1 or slices == 1 and plan.segments > SPAN:
        return plan
    pieces = -(-blocks // min(idle, blocks))
    leaders = -(-blocks // pieces)
    best = plan
    for lead in range(GROUP, chunks, GROUP):
        per = -(-(chunks - lead) // plan.segments)
        if chunks - lead - (plan.segments - 1) * per < 1:
            continue
        led = dataclasses.replace(
            plan,
            per_segment=per,
            more=0,
            share=(per - lead) / (GROUP * plan.segments),
            leaders=leaders,
            pieces=pieces,
            lead=lead,
        )
        if pieces * lead > pace.walk(led):
            break
        if pace.walk(led) < pace.walk(best):
            best = led
    return best


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
    leading: bool = True,
) -> Plan:
    """How to divide `slices` of each group in `chunks` into `segments` at most, for blocks of `block_slices`.

    `wide` says that states have more than 128 channels; without `leading` there are no leaders.
    """
    blocks_per_group = -(-slices // block_slices)
    segments = min(segments, chunks)
    # Equal ones, and equal parts of what the first pass sums up: all blocks wait until all are through with that.
    per_segment = -(-chunks // segments)
    segments = -(-chunks // per_segment)
    more = _more(segments, per_segment) if wide else 0
    per_segment = -(-(chunks - more) // segments)
    share = _share(segments, per_segment, block_slices, more)
    found = Plan(blocks_per_group, segments, per_segment, more, share)
    if not leading:
        return found
    blocks = groups * blocks_per_group
    idle = multiprocessors // batch - blocks * segments
    return _led(found, block_slices, blocks, chunks, idle, _WIDE if wide else _NARROW[block_slices])


def scorers(batch: int, groups: int, plan: Plan, multiprocessors: int) -> int:
    """How many blocks to add to each segment that work out its C B^T while the others are at their first pass.

    As many as multiprocessors are left for. 0 is a launch of its own before this one; so it is where there are several
    groups, each of which has scores.
    """
    if groups > 1:
        return 0
    idle = multiprocessors - batch * plan.blocks_per_group * plan.segments
    return max(0, min(idle // (batch * plan.segments), plan.per_segment))
