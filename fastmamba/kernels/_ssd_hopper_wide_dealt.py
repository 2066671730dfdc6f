"""Blocks of the Hopper SSD for a state of 256 whose segments are dealt out by how fast heads decay.

Segments are equal, but for the first one, which is somewhat longer: its block waits for nobody. Before one begins the
state there has to be known. How far back chunks count, before nothing of the state is left, `falls` tell: log2 of
the decay over each chunk of each head. Of those chunks the segment's own block sums up the last ones, at most so many
that all blocks have equal parts of what there is, and the block before it the others. Where nothing is left of what
came before the segment's own part, it waits for nobody.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastmamba.kernels import _dealt
from fastmamba.kernels._ssd_hopper_decays import _add
from fastmamba.kernels._ssd_hopper_handover import _places
from fastmamba.kernels._ssd_hopper_terms import GROUP, Q, sync_threads

NOTHING = gl.constexpr(_dealt.NOTHING.value)
LEAST = gl.constexpr(2.0**_dealt.NOTHING.value)
MORE = gl.constexpr(4)  # chunks that the first segment has more than the others, of an H200's blocks that end last
STEP = gl.constexpr(64)  # chunks that are looked at at a time, by every warp: they need not exchange anything
ALL = gl.constexpr(1 << 30)  # chunks: something is left however far one looks back
NEEDS = gl.constexpr(1)  # a block is to add what those before it hand on
HANDS = gl.constexpr(2)  # it hands on what it sums up
ENDS = gl.constexpr(4)  # and nothing of what came before that is left
KEEPS = gl.constexpr(8)  # meanwhile it keeps what it has summed up before its segment
STORES = gl.constexpr(16)  # it is the last one
SKIPS = gl.constexpr(5)  # bits of these; behind them are two of how many of the first four chunks are left out
SEGMENT = gl.constexpr(8)  # behind those is which one it is


@gluon.jit
def begin_of(seg, segments, total):
    """The first chunk of a segment; of that behind the last one, `total`."""
    more = gl.where(segments > 1, MORE, 0)
    return gl.where(seg > 0, more + seg * (total - more) // segments, 0)


@gluon.jit
def _own_part(seg, segments, total):
    """Chunks before a segment that its own block sums up, at most: whole groups, and equal parts for all blocks."""
    last = begin_of(segments - 1, segments, total)  # what all of them sum up
    even = begin_of(seg, segments, total) - (seg * last).to(gl.float32) / segments.to(gl.float32)
    return gl.minimum((even / GROUP + 0.5).to(gl.int32), (total - MORE) // segments // GROUP) * GROUP


@gluon.jit
def _passes(falls_ptr, other_head, seg, segments, total, HEADS: gl.constexpr):
    """The first passes of a segment's block, of one head or two; `falls_ptr` is at the first, the other one that far.

    Blocks that one of them hands on to the other look at the same chunks in the same order, so that both know it.

    Returns:
        How many chunks before the segment it sums up, as whole groups, then how many in all, how far into the segment
        the others begin, and `NEEDS`, `HANDS` and so on.
    """
    begin = begin_of(seg, segments, total)
    end = begin_of(seg + 1, segments, total)
    part = _own_part(seg, segments, total)
    other = _own_part(seg + 1, segments, total)  # which the next segment's block has of this segment
    # Chunks are counted backward, from the segment's begin in the first row of a head, from its end in the second one.
    layout: gl.constexpr = gl.BlockedLayout([2 * HEADS, STEP // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, 2 * HEADS, gl.SliceLayout(1, layout))
    until = gl.where(row % 2 == 0, begin, end)[:, None]
    length = gl.where(row % 2 == 0, part, end - begin)[:, None]
    rows = falls_ptr + row[:, None] // 2 * other_head
    place = gl.arange(0, STEP, gl.SliceLayout(0, layout))[None, :]
    falls = gl.load(rows + gl.maximum(until - 1 - place, until - length))  # no mask: those would come one after another
    falls = gl.where(place < length, falls, 0.0)
    sums = gl.associative_scan(falls, 1, _add)
    found = gl.min(gl.where((sums < NOTHING) & (place < length), place + 1, ALL), axis=1)
    kept = gl.max(gl.where(row % 2 == 0, found, 0), axis=0)
    reach = gl.max(gl.where(row % 2 == 1, found, 0), axis=0)
    back = end * 0 + STEP
    if ((reach == ALL) & (back < end - begin)) | ((kept == ALL) & (back < part)):
        fallen = gl.sum(falls, axis=1)
        while ((reach == ALL) & (back < end - begin)) | ((kept == ALL) & (back < part)):
            further = place + back
            falls = gl.load(rows + gl.maximum(until - 1 - further, until - length))
            falls = gl.where(further < length, falls, 0.0)
            sums = gl.associative_scan(falls, 1, _add) + fallen[:, None]
            crossed = (sums < NOTHING) & (further < length)
            found = gl.minimum(found, gl.min(gl.where(crossed, further + 1, ALL), axis=1))
            fallen += gl.sum(falls, axis=1)
            kept = gl.max(gl.where(row % 2 == 0, found, 0), axis=0)
            reach = gl.max(gl.where(row % 2 == 1, found, 0), axis=0)
            back += STEP
    needs = (seg > 0) & (kept > part)
    ends = (seg > 0) & (kept <= part)
    hands = (seg + 1 < segments) & (reach > other)
    counted = gl.minimum(kept, part)
    kept = (counted + GROUP - 1) // GROUP * GROUP
    own = gl.where(hands, gl.minimum(reach, end - begin) - other, 0)
    gap = gl.where(hands, end - begin - other - own, 0)
    links = gl.where(needs, NEEDS, 0) + gl.where(hands, HANDS, 0)
    links += gl.where(ends | (gap > 0), ENDS, 0)
    links += gl.where(hands & (kept > 0), KEEPS, 0) + gl.where(seg + 1 == segments, STORES, 0)
    links += (kept - counted << SKIPS) + (seg << SEGMENT)
    return kept, kept + own, gap, links


@gluon.jit
def _await_parts(flag_ptr, count):
    """Wait for what the `count` segments before this one hand on; how many of them there are to look back to.

    A flag is 1, or 2 where of what came before that segment's part nothing is left.
    """
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    flags = flag_ptr - gl.minimum(lane + 1, count)
    found = 1
    while found % 2 == 1:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flags], dtype=gl.int32, is_pure=False, pack=1
        )
        first = gl.where(seen == 0, 2 * lane + 1, gl.where(seen == 2, 2 * lane, 64))
        found = gl.min(gl.where(lane < count, first, 64), axis=0)
    sync_threads()
    return gl.minimum(found // 2 + 1, count)


@gluon.jit
def _hand_on(
    state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, links, N: gl.constexpr,
    kept, decay_before,
):  # fmt: skip
    """The state before a block's segment, as `_hand_over`, where `links` say who needs what.

    Flags are zero before, and nobody lowers them.
    """
    element: gl.constexpr = handed_ptr.dtype.element_ty
    layout: gl.constexpr = state.type.layout
    row = handed_ptr + handed_row
    seg = links >> SEGMENT
    before = state  # what was summed up before the segment
    if links & HANDS != 0:
        gl.store(_places(row, N, layout), state.to(element))
        gl.store(passed_ptr + gl.zeros_like(decay).to(gl.int32), decay)  # the same in every row
        sync_threads()  # every thread's part is written before the flag rises
        gl.atomic_xchg(flag_ptr, gl.where(links & ENDS != 0, 2, 1), sem="release")
        before = gl.load(_places(kept, N, layout), mask=links & KEEPS != 0, other=0.0).to(gl.float32)
    since = gl.sum(decay_before, axis=0)  # decay from the end of a segment's part to the beginning of this one
    count = seg * 0
    if links & NEEDS != 0:
        count = _await_parts(flag_ptr, seg)
    for j in range(1, count + 1):
        if (since < LEAST) == 0:
            # written by another multiprocessor a moment ago: not from the L1 cache
            part = gl.load(_places(row - j * (Q * N), N, layout), cache_modifier=".cg").to(gl.float32)
            passed = gl.load(passed_ptr - j, cache_modifier=".cg")
            before += part * since
            since *= passed
    if init_ptr is not None:
        if (count == seg) & ((since < LEAST) == 0):
            before += gl.load(init_ptr + state_row + at).to(gl.float32) * since
    return before
