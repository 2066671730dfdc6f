"""How blocks of the Hopper SSD that walk one sequence hand its state on."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fastmamba.kernels._ssd_hopper_terms import GROUP, SPAN, Q, sync_threads


@gluon.jit
def _ahead(seg, share, STEP: gl.constexpr = GROUP, first=0.0):
    """How many chunks before its segment a block begins its first pass: steps of one chunk or a group of them.

    `first` is how many steps the others begin later by: what the first segment has more, or leaders walk before it.
    """
    return (seg.to(gl.float32) * (share * (GROUP // STEP)) + (first + 0.5)).to(gl.int32) * STEP


@gluon.jit
def _await(flag_ptr, count):
    """Wait until the `count` flags before this one are raised: what their writers wrote before is visible then."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    flags = flag_ptr - gl.minimum(lane + 1, count)
    raised = 0
    while raised == 0:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flags], dtype=gl.int32, is_pure=False, pack=1
        )
        raised = gl.min(seen, axis=0)
    sync_threads()


@gluon.jit
def _read(flag_ptr, count, seg, segments):
    """Count a reader of what the `count` raised flags before this one, a segment's, stand for.

    A flag is 0, then 1, then counts on: raised for whoever still waits, until the last reader of all that it has lets
    it fall back.
    """
    before = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])) + 1
    other = seg - before
    place = other % SPAN
    readers = gl.minimum(gl.where(place + 1 < SPAN, SPAN - 1 - place, SPAN), segments - 1 - other)
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $3, 0; @p red.relaxed.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0;}",
        "=r,l,r,r",
        [flag_ptr - gl.minimum(before, count), readers, (before <= count).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def read_later(flag_ptr, seg, segments, reads):
    """What a block still owes the flags of the segments before it, where it has not waited for them."""
    place = seg % SPAN
    whole = (seg + 1 < segments) & (place + 1 == SPAN)
    count = gl.where((reads != 0) | whole | (seg >= segments), 0, gl.minimum(seg, place + 1))
    if count > 0:
        _await(flag_ptr, count)
        _read(flag_ptr, count, seg, segments)


@gluon.jit
def _places(ptr, N: gl.constexpr, layout: gl.constexpr):
    """Where a state's Q * N elements are kept: as the threads of a warp hold them, rows of the state lie apart.

    A thread's places are one address and constants, by way of sums in this order.
    """
    p = gl.arange(0, Q, gl.SliceLayout(1, layout)).to(gl.int64)
    n = gl.arange(0, N, gl.SliceLayout(0, layout)).to(gl.int64)
    own = ptr + ((p % 8 * 8 + p // 16 * 64)[:, None] + (n % 8)[None, :])
    places = own + ((p // 8 % 2 * 256)[:, None] + (n // 8 * 512)[None, :])
    return gl.max_contiguous(gl.multiple_of(places, [8, 8]), [1, 8])


@gluon.jit
def _ways(b, v, v1, slices, seg, segments, parts, handed_ptr, sync_ptr, N: gl.constexpr):
    """Of slices v and v1 in a segment: the row of `handed`, the place of the decay over a first pass, the flag.

    `handed` is what all `parts`, segments of all slices, hand on, then what they keep for themselves, [P, N] each, and
    behind it their decays in float32.
    """
    row = ((b.to(gl.int64) * slices + v) * segments + seg) * (Q * N)
    row1 = ((b.to(gl.int64) * slices + v1) * segments + seg) * (Q * N)
    passed = (handed_ptr + parts.to(gl.int64) * (2 * Q * N)).to(gl.pointer_type(gl.float32), bitcast=True)
    passed += (b * slices + v) * segments + seg
    passed1 = passed + (v1 - v) * segments
    flag = sync_ptr + (b * slices + v) * segments + seg
    flag1 = sync_ptr + (b * slices + v1) * segments + seg
    return row, row1, passed, passed1, flag, flag1


@gluon.jit
def _hand_over(
    state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg, segments, N: gl.constexpr,
    kept, decay_before, ahead, going=None, snapshot=None, reads=None,
):  # fmt: skip
    """The state before a block's segment, [P, N], given what its first pass adds, which goes to the blocks after.

    Each of those sums up what the ones before it add, back to one that hands on a whole state: every SPAN-th does. So a
    segment waits for first passes, which all end at the same time, and for another's sum only once in SPAN segments.
    `state` is what the first pass adds, `decay` [P] what it leaves of an earlier state. Where that pass began `ahead`
    chunks before the segment, `kept` is where what it had added until then is, `decay_before` [P] what it had left.
    Or `snapshot` is what it had added; no segment hands on a whole state then. `going` is told when nothing is left to
    be fenced. Where `reads` is 0, nothing is left of what others add: this block need not wait for them.
    """
    element: gl.constexpr = handed_ptr.dtype.element_ty
    layout: gl.constexpr = state.type.layout
    row = handed_ptr + handed_row
    mine = _places(row, N, layout)
    place = seg % SPAN
    hands = seg + 1 < segments
    if hands:
        gl.store(mine, state.to(element))
        gl.store(passed_ptr + gl.zeros_like(decay).to(gl.int32), decay)  # the same in every row
        if place + 1 < SPAN:
            sync_threads()  # every thread's part is written before the flag rises
            gl.atomic_xchg(flag_ptr, 1, sem="release")
    if going is not None:
        mbarrier.arrive(going, count=1)
    whole = hands & (place + 1 == SPAN)
    if snapshot is not None:
        before = snapshot
        scale = decay_before
    else:  # on its way while this block waits for others; for a whole state later
        before = gl.load(_places(kept, N, layout), mask=(ahead > 0) & ~whole, other=0.0).to(gl.float32)
        scale = gl.where(whole, 1.0, decay_before)
    since = 1.0  # decay from the end of a segment to the beginning of this one
    count = gl.minimum(seg, place + 1)
    if reads is not None:
        count = gl.where((reads != 0) | whole, count, 0)
    if count > 0:
        _await(flag_ptr, count)
        _read(flag_ptr, count, seg, segments)
    for j in range(1, count + 1):
        if since != 0.0:  # of what has decayed to nothing, nothing need be read
            # written by another multiprocessor a moment ago: not from the L1 cache
            part = gl.load(_places(row - j * (Q * N), N, layout), cache_modifier=".cg").to(gl.float32)
            passed = gl.load(passed_ptr - j, cache_modifier=".cg")
            before += part * (scale * since)[:, None]
            since *= passed
    if init_ptr is not None:
        if count == seg and place == seg:
            before += gl.load(init_ptr + state_row + at).to(gl.float32) * (scale * since)[:, None]
    if whole:
        gl.store(mine, (gl.load(mine).to(gl.float32) + before * decay[:, None]).to(element))
        sync_threads()
        gl.atomic_xchg(flag_ptr, 1, sem="release")
        if ahead > 0:
            before = before * decay_before[:, None] + gl.load(_places(kept, N, layout)).to(gl.float32)
    return before
