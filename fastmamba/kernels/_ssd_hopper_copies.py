"""Copies to and from shared memory in the Hopper SSD, and what is asked for ahead of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastmamba.kernels._ssd_hopper_terms import EARLY, Q, _advance, _load, _seen_as, _store, piece_of, slices_of


@gluon.jit
def prefetch(ptr):
    """Bring what is at these addresses into the L2 cache."""
    gl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fence_inits(n):
    """Let the copy engine see what mbarriers have been initialised. Other fences wait for loads that are under way."""
    code: gl.constexpr = "{fence.mbarrier_init.release.cluster; mov.b32 $0, 0;}"
    gl.inline_asm_elementwise(code, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def of_state(arena, N: gl.constexpr):
    """The block's memory as places for B and C, [Q, N] each: in the second pass B and C of each stage."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    return _seen_as(arena, arena.dtype, [arena.shape[0] * Q // N, 1, Q, N], tile)


@gluon.jit
def load_first(
    x_desc, B_desc, arena, bar, slot, b, t, v, g, there,
    N: gl.constexpr, PAIR: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """Start copying what a chunk of the first pass needs, B and x, into a slot."""
    mbarrier.expect(bar, (N + PAIR * Q) * Q * 2, pred=there)
    _load(B_desc, [b, t, g * N], bar, of_state(arena, N).index(slot * (3 - PAIR)), pred=there)
    LAST: gl.constexpr = arena.shape[0] - EACH
    for k in gl.static_range(PAIR):
        _load(x_desc, [b, t, (v + k) * Q], bar, arena.index(LAST + k - slot * EACH), pred=there)


@gluon.jit
def load_second(
    x_desc, B_desc, C_desc, z_desc, arena, bar, stage, b, t, v, g,
    N: gl.constexpr, PAIR: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start copying what a chunk of the second pass needs into a stage."""
    mbarrier.expect(bar, (2 * N + (2 if GATED else 1) * PAIR * Q) * Q * 2)
    states = of_state(arena, N)
    _load(B_desc, [b, t, g * N], bar, states.index(2 * stage))
    _load(C_desc, [b, t, g * N], bar, states.index(2 * stage + 1))
    EACH: gl.constexpr = PAIR * (2 if GATED else 1)
    LAST: gl.constexpr = arena.shape[0] - EACH
    for k in gl.static_range(PAIR):
        _load(x_desc, [b, t, (v + k) * Q], bar, arena.index(LAST + k - stage * EACH))
        if GATED:
            _load(z_desc, [b, t, (v + k) * Q], bar, arena.index(LAST + (PAIR + k) - stage * EACH))


@gluon.jit
def first_stage(summed, PAIR: gl.constexpr, STAGES: gl.constexpr):
    """Where the second pass begins: a lone walker's, which is as fast as loads are, goes on through the same stages."""
    return summed % STAGES if PAIR == 1 else summed * 0


@gluon.jit
def first_phase(summed, PAIR: gl.constexpr, STAGES: gl.constexpr):
    """How often its stage has been in use, by parity."""
    return summed // STAGES & 1 if PAIR == 1 else summed * 0


@gluon.jit
def of_first_pass(c, ahead, gap):
    """The c-th chunk of a first pass, from the segment on: `ahead` come before it, `gap` of its first are left out."""
    return c - ahead + gl.where(c >= ahead, gap, 0)


@gluon.jit
def load_role(
    begun, x_desc, B_desc, C_desc, z_desc, x_ptr, stride_x_t, tokens, second, arena, came, summed_up, full, walked,
    walking, going, b, first, v, g, ahead, skip, gap, summed, chunks, pieces, block, listed, part_of_group,
    blocks_per_group, slices_per_group,
    N: gl.constexpr, PAIR: gl.constexpr, GATED: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
    DEEP: gl.constexpr, FIRST_EACH: gl.constexpr, DEALT: gl.constexpr,
):  # fmt: skip
    line = gl.arange(0, PAIR * Q, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    beside = line // Q * Q * second
    stage = 1  # the first chunk's has been started before there were roles
    phase = 0
    if SPLIT:
        slot = 2 % DEEP  # and the second one's
        lap = 2 // DEEP
        for i in range(skip + 2, summed):
            if i + EARLY < summed:  # B is in the L2 cache mostly, where another slice's block has asked for it
                t = gl.minimum(of_first_pass(i + EARLY, ahead, gap) * Q + line % Q, tokens - 1)
                prefetch(x_ptr + (t.to(gl.int64) * stride_x_t + beside))
            if i - skip == DEEP:  # until now no barrier that the scores initialise is needed
                mbarrier.wait(begun, 0)
            mbarrier.wait(summed_up.index(slot), lap ^ 1, pred=i - skip >= DEEP)
            t = first + of_first_pass(i, ahead, gap) * Q
            load_first(x_desc, B_desc, arena, came.index(slot), slot, b, t, v, g, True, N, PAIR, FIRST_EACH)
            slot, lap = _advance(slot, lap, DEEP)
    mbarrier.wait(begun, 0)
    if SPLIT:
        if PAIR == 2:
            # The walkers' fence would wait for these loads too, and a later segment's block for the walkers.
            mbarrier.wait(going, 0)
        stage = first_stage(summed - skip, PAIR, STAGES)
        phase = first_phase(summed - skip, PAIR, STAGES)
    begin = first
    for piece in range(pieces if SPLIT else 1):
        for c in range(0 if SPLIT else 1, chunks):
            mbarrier.wait(walked.index(stage), phase ^ 1)
            load_second(x_desc, B_desc, C_desc, z_desc, arena, full.index(stage), stage, b, begin + c * Q, v, g, N,
                        PAIR, GATED)  # fmt: skip
            stage, phase = _advance(stage, phase, STAGES)
        if SPLIT:
            coming, nth = piece_of(block, listed, piece + 1, DEALT)
            g, v, _ = slices_of(coming, part_of_group, blocks_per_group, slices_per_group, PAIR)
            if DEALT:
                begin = nth * (chunks * Q)


@gluon.jit
def store_role(
    begun, y_desc, ys, walked, unready, walking, b, first, v, second, skip, summed, chunks, pieces, block,
    listed, part_of_group, blocks_per_group, slices_per_group,
    PAIR: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, DEALT: gl.constexpr,
):  # fmt: skip
    mbarrier.wait(begun, 0)
    if SPLIT:
        mbarrier.wait(walking, 0)
    place = 0
    stage = 0
    phase = 0
    if SPLIT:
        stage = first_stage(summed - skip, PAIR, STAGES)
        phase = first_phase(summed - skip, PAIR, STAGES)
    begin = first
    for piece in range(pieces if SPLIT else 1):
        for c in range(chunks):
            mbarrier.wait(walked.index(stage), phase)
            stage, phase = _advance(stage, phase, STAGES)
            fence_async_shared()  # the copy engine reads what the walkers wrote, who need not wait for this fence
            for k in gl.static_range(PAIR):
                if k == 0:
                    _store(y_desc, [b, begin + c * Q, v * Q], ys.index(place))
                elif second != 0:
                    _store(y_desc, [b, begin + c * Q, (v + 1) * Q], ys.index(place))
                place ^= 1
            tma.store_wait(0)
            for k in gl.static_range(PAIR):
                mbarrier.arrive(unready.index(place ^ 1 if PAIR == 1 else k), count=1)
        if SPLIT:
            coming, nth = piece_of(block, listed, piece + 1, DEALT)
            _, v, second = slices_of(coming, part_of_group, blocks_per_group, slices_per_group, PAIR)
            if DEALT:
                begin = nth * (chunks * Q)
