"""What the warps of a block do in the Hopper SSD; `fastmamba.kernels.ssd_hopper` has the picture and the launch.

Scores and walkers are here, the loader and the store in `_ssd_hopper_copies`, the decays in `_ssd_hopper_decays`.
They all meet at mbarriers in shared memory, in pairs, one for each direction:

    came, summed_up    a slot holds x and B of a chunk of the first pass; the walkers are through with them. Of a lone
                       walker they are `full` and `walked`
    full, walked       a stage holds a chunk of x, B, C and z; the walkers are through with the chunk
    known, unknown     the decays of four chunks are there; nobody needs them any more
    scored, walked     G of a chunk, and what each token adds to its own output, are there
    walked, unready    y of a chunk is there; it is on its way to global memory
    going              two walkers have handed on their states: loads of the second pass may start
    walking            the walkers are through with the first pass (in which the scores and the store have no part)
    begun              the barriers are initialised, by the scores, but for those of the first loads
    asked              dt of the first four chunks is there, where the scores' warps load it

A walker's arrival at a barrier costs it one of its own warps', and the walkers are what a block waits for: so they have
one for a chunk, `walked`, which tells the loader, the scores and the store.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_copies import fence_inits, first_phase, first_stage, of_state
from fastmamba.kernels._ssd_hopper_decays import _numbers, _weights
from fastmamba.kernels._ssd_hopper_halves import _packed, _product, _rounded, _silu, _sum_of_products, _unpacked, _widen
from fastmamba.kernels._ssd_hopper_handover import _hand_over, _places, read_later
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _SINCE,
    _TOTAL,
    GROUP,
    Q,
    _advance,
    piece_of,
    slices_of,
    sync_threads,
)


@gluon.jit
def _products(states, stage, N: gl.constexpr, mma: gl.constexpr):
    """Start C B^T of a chunk, [t, s]."""
    C = states.index(2 * stage + 1).reshape([Q, N])
    B = states.index(2 * stage).reshape([Q, N])
    return warpgroup_mma(C, B.permute([1, 0]), gl.zeros((Q, Q), gl.float32, mma), use_acc=False, is_async=True)


@gluon.jit
def _by_register(v):
    """Of [64, 64] accumulators: the bits of row and column that a thread's registers tell apart, last."""
    return v.reshape([4, 2, 8, 2, 2, 2, 4, 2]).permute([0, 2, 6, 3, 4, 7, 5, 1])


@gluon.jit
def _on_diagonal(v, t, s):
    """Of the last three bits those that row t asks for; zero in threads whose columns do not meet their row."""
    first, second = v.split()
    t, _ = t.split()
    s, _ = s.split()
    v = gl.where(t % 2 == 1, second, first)
    first, second = v.split()
    t, _ = t.split()
    s, _ = s.split()
    v = gl.where(t // 16 % 2 == 1, second, first)
    first, second = v.split()
    t, _ = t.split()
    s, _ = s.split()
    v = gl.where(t // 32 == 1, second, first)
    return gl.where(t // 2 % 4 == s // 2 % 4, v, 0.0)


@gluon.jit
def _diagonal(v, t, s):
    """The diagonal of [64, 64] accumulators whose rows are t and columns s.

    A comparison of every element's row and column takes four times as many instructions: of a thread's registers, most
    can be left out as they are.
    """
    v0, v1 = _by_register(v).split()
    t0, t1 = _by_register(t[:, None] + s[None, :] * 0).split()
    s0, s1 = _by_register(t[:, None] * 0 + s[None, :]).split()
    v0, _ = v0.split()
    t0, _ = t0.split()
    s0, _ = s0.split()
    _, v1 = v1.split()
    _, t1 = t1.split()
    _, s1 = s1.split()
    both = gl.join(_on_diagonal(v0, t0, s0), _on_diagonal(v1, t1, s1))  # rows % 16 below 8, and the others
    return gl.sum(both.permute([0, 3, 1, 2]).reshape([Q, 4]), axis=1)


@gluon.jit
def scores_role(
    begun,
    unready,
    first_dt0,  # of the first four chunks, and of head 1
    first_dt1,
    dts,
    asked,
    arena,
    nums,
    G0,
    G1,
    own0,
    own1,
    D_ptr,
    D0,
    D1,
    came,
    summed_up,
    full,
    known,
    unknown,
    scored,
    walked,
    walking,
    going,
    skip,
    summed,
    chunks,
    pieces,
    block,
    listed,
    part_of_group,
    blocks_per_group,
    slices_per_group,
    stride_D_h,
    N: gl.constexpr,
    PAIR: gl.constexpr,
    SLICES: gl.constexpr,
    RELAXED: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    DEEP: gl.constexpr,
    HEADS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    DEALT: gl.constexpr,
):
    dtype: gl.constexpr = arena.dtype
    states = of_state(arena, N)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # The other roles' first instructions and numbers are on their way meanwhile.
    mbarrier.init(walking, count=PAIR)
    if SPLIT and PAIR == 2:
        mbarrier.init(going, count=2)
    for i in gl.static_range(DEEP):  # one of a kind at a time: Triton puts a barrier between two
        if SPLIT and PAIR == 2:
            mbarrier.init(summed_up.index(i), count=PAIR)  # the walkers
        if i < STAGES:
            if i > 0 and not SPLIT or SPLIT and PAIR == 2:
                mbarrier.init(full.index(i), count=1)
            mbarrier.init(walked.index(i), count=PAIR)  # the walkers
        if i < 2:
            mbarrier.init(known.index(i), count=HEADS)  # the decays
            mbarrier.init(unknown.index(i), count=PAIR)  # the walkers, or the scores for them
            mbarrier.init(scored.index(i), count=1)
            mbarrier.init(unready.index(i), count=1)
    fence_inits(chunks)
    sync_threads()
    mbarrier.arrive(begun, count=1)
    if SPLIT or PAIR == 1:
        dts.index(0).store(first_dt0)
        if HEADS == 2:
            dts.index(1).store(first_dt1)
        mbarrier.arrive(asked, count=1)
    t = gl.arange(0, Q, gl.SliceLayout(1, mma))
    s = gl.arange(0, Q, gl.SliceLayout(0, mma))
    earlier = _packed(gl.where(t[:, None] > s[None, :], -1, 0).to(gl.int16))
    skip0 = 0.0
    skip1 = 0.0
    if D_ptr is not None and not PER_CHANNEL:
        skip0 = gl.load(D_ptr + D0).to(gl.float32)
        skip1 = gl.load(D_ptr + D1).to(gl.float32)
    if SPLIT:
        mbarrier.wait(walking, 0)
    stage = 0
    phase = 0
    before = 0  # where the last chunk was that the walkers must be through with
    passed = 0
    if SPLIT:
        stage = first_stage(summed - skip, PAIR, STAGES)
        phase = first_phase(summed - skip, PAIR, STAGES)
        before = first_stage(summed - skip, PAIR, STAGES)
        passed = first_phase(summed - skip, PAIR, STAGES)
    groups = (summed + GROUP - 1) // GROUP
    group = groups & 1
    unneeded = group
    turn = groups // 2 & 1
    buffer = 0
    for piece in range(pieces if SPLIT else 1):
        free = gl.where(piece == 0, 2, 0)  # the chunk that is the first one to wait for a place for G
        for c in range(chunks):
            mbarrier.wait(full.index(stage), phase)
            products = _products(states, stage, N, mma)
            mbarrier.wait(known.index(group), turn)
            mbarrier.wait(walked.index(before), passed, pred=c >= free)
            if c >= free:
                before, passed = _advance(before, passed, STAGES)
                if c % GROUP == 1:  # the walkers were at the last of four chunks
                    mbarrier.arrive(unknown.index(unneeded), count=PAIR)
                    unneeded ^= 1
            scores = warpgroup_mma_wait(0, [products])  # [t, s]
            # What a token adds to its own output is the largest of its contributions: it is not rounded as G is.
            same = gl.convert_layout(_diagonal(scores, t, s), gl.SliceLayout(1, mma))
            for k in gl.static_range(HEADS):
                cum = _numbers(nums, k, group, c, _CUM).load(gl.SliceLayout(1, mma))
                entry = _numbers(nums, k, group, c, _ENTRY).load(gl.SliceLayout(0, mma))
                decay = gl.exp2(cum[:, None] - entry[None, :])
                if RELAXED:
                    # The sum is for ptxas, which serialises matrix products whose results are rounded at once.
                    G = _packed((scores + 0.0).to(dtype) * decay.to(dtype))
                else:
                    G = _rounded(scores * decay, dtype)
                # Above the diagonal, where the decay may be infinite; two at a time, as every instruction here counts.
                G = _unpacked(G & earlier, dtype, mma)
                dt = gl.exp2(cum - _numbers(nums, k, group, c, _ENTRY).load(gl.SliceLayout(1, mma)))
                if k == 0:
                    G0.index(buffer).store(G)
                    own0.index(buffer).store(same * dt + skip0)
                else:
                    G1.index(buffer).store(G)
                    own1.index(buffer).store(same * dt + skip1)
            fence_async_shared()
            mbarrier.arrive(scored.index(buffer), count=1)
            stage, phase = _advance(stage, phase, STAGES)
            if c % GROUP == GROUP - 1:
                group, turn = _advance(group, turn, 2)
            buffer ^= 1
        if SPLIT and D_ptr is not None and not PER_CHANNEL:
            if piece + 1 < pieces:
                coming, _ = piece_of(block, listed, piece + 1, DEALT)
                _, v, second = slices_of(coming, part_of_group, blocks_per_group, slices_per_group, PAIR)
                skip0 = gl.load(D_ptr + v // SLICES * stride_D_h).to(gl.float32)
                skip1 = gl.load(D_ptr + (v + second) // SLICES * stride_D_h).to(gl.float32)


@gluon.jit
def _fetch(k: gl.constexpr, xs, full, stage, phase, there, EACH: gl.constexpr, layout: gl.constexpr):
    """x^T [P, Q] of a chunk in registers; anything, where `there` says that it is not there."""
    mbarrier.wait(full.index(stage), phase, pred=there)
    return xs.index(stage * EACH + k).reshape([Q, Q]).permute([1, 0]).load(layout)


@gluon.jit
def _weigh(k: gl.constexpr, xT, nums, group, c):
    """x^T times its weights."""
    left, rest = _weights(nums, k, group, c, xT.dtype, gl.SliceLayout(0, xT.type.layout))
    return _sum_of_products(xT, left[None, :], _product(xT, rest[None, :]))


@gluon.jit
def _beside(head: gl.constexpr, xT, owns, D, nums, group, c, mma: gl.constexpr, PER_CHANNEL: gl.constexpr):
    """What y^T = S C^T is multiplied by, and what is added to it for the tokens' own sake."""
    since = _numbers(nums, head, group, c, _SINCE).load(gl.SliceLayout(0, mma))[None, :]
    own = owns.load(gl.SliceLayout(0, mma))[None, :]
    if PER_CHANNEL:
        own = own + D[:, None]
    return since, gl.convert_layout(_widen(xT), mma) * own


@gluon.jit
def _walk_chunks(
    k: gl.constexpr, state, pairs, group, turn, stage, phase, place, stored, buffer, lap,
    chunks, to_come, D, arena, nums, G, owns, ys, full, known, scored, walked, unready,
    N: gl.constexpr, PAIR: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr, Y_SCALE: gl.constexpr,
    HEADS: gl.constexpr, PER_CHANNEL: gl.constexpr,
):  # fmt: skip
    """The second pass over so many chunks of walker k's slice, of `to_come` in all, from one state to the next."""
    head: gl.constexpr = k if HEADS == 2 else 0
    dtype: gl.constexpr = arena.dtype
    states = of_state(arena, N)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    narrow_state: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    EACH: gl.constexpr = PAIR * (2 if GATED else 1)  # tiles of x and z from one stage to the one before
    AT: gl.constexpr = arena.shape[0] - EACH + k
    for c in range(chunks):
        # With nothing, which ptxas does not know: it would see x written that a product under way is to read next.
        xT = _unpacked(pairs ^ (stage >> 16), dtype, narrow)
        # Here, not while the last chunk's product runs: ptxas would serialise the products.
        weighted = _weigh(head, xT, nums, group, c)
        total = _numbers(nums, head, group, c, _TOTAL).load(gl.SliceLayout(1, wide))
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        before = gl.convert_layout(state.to(dtype), narrow_state)
        state *= total[:, None]
        C = states.index(2 * stage + 1).reshape([Q, N])
        # The state needs nothing of y: both products are under way before either is waited for.
        y = warpgroup_mma(before, C.permute([1, 0]), zeros, use_acc=False, is_async=True)
        sum = warpgroup_mma(weighted, states.index(2 * stage).reshape([Q, N]), state, is_async=True)
        if PAIR == 1:  # with two there are not the registers to have this ready before
            mbarrier.wait(scored.index(buffer), lap)
            since, own = _beside(head, xT, owns.index(buffer), D, nums, group, c, mma, PER_CHANNEL)
        y = warpgroup_mma_wait(1, [y])
        if PAIR == 2:
            mbarrier.wait(scored.index(buffer), lap)
            since, own = _beside(head, xT, owns.index(buffer), D, nums, group, c, mma, PER_CHANNEL)
        y = y * since + own
        state = warpgroup_mma_wait(0, [sum])
        y = warpgroup_mma(xT, G.index(buffer).permute([1, 0]), y, is_async=True)
        # in its shadow: the next chunk's x comes
        if c % GROUP == GROUP - 1:
            group, turn = _advance(group, turn, 2)
        used = stage
        stage, phase = _advance(stage, phase, STAGES)
        pairs = _packed(_fetch(AT, arena, full, stage, phase, c + 1 < to_come, -EACH, narrow))
        mbarrier.wait(known.index(group), turn, pred=c + 1 < to_come)
        if GATED:
            z = arena.index(AT + PAIR - used * EACH).reshape([Q, Q]).permute([1, 0]).load(narrow)
            gate = _silu(gl.convert_layout(_widen(z), mma))
        y = warpgroup_mma_wait(0, [y])
        if GATED:
            y *= gate
        mbarrier.wait(unready.index(place), stored ^ 1)
        ys.index(place).reshape([Q, Q]).permute([1, 0]).store((y * Y_SCALE).to(dtype))
        mbarrier.arrive(walked.index(used), count=1)
        if PAIR == 1:
            place, stored = _advance(place, stored, 2)
        else:
            stored ^= 1
        buffer, lap = _advance(buffer, lap, 2)
    return state, pairs, group, turn, stage, phase, place, stored, buffer, lap


@gluon.jit
def _of_channels(D_ptr, v, stride_D_h, stride_D_p, SLICES: gl.constexpr, mma: gl.constexpr):
    """D of a slice's channels."""
    rows = gl.arange(0, Q, gl.SliceLayout(1, mma))
    return gl.load(D_ptr + v // SLICES * stride_D_h + (v % SLICES * Q + rows) * stride_D_p).to(gl.float32)


@gluon.jit
def walk_role(
    k: gl.constexpr,
    begun,
    D_ptr,
    init_ptr,
    final_ptr,
    handed_ptr,
    passed_ptr,
    flag_ptr,
    arena,
    nums,
    G,
    owns,
    ys,
    came,
    summed_up,
    full,
    known,
    unknown,
    scored,
    walked,
    unready,
    walking,
    going,
    v,
    there,  # 1 where slice v is this walker's: a group of an odd number of slices leaves one over
    state_row,
    handed_row,
    parts,  # of all blocks
    stride_D_h,
    stride_D_p,
    seg,  # of a leader: `segments`
    segments,
    reads,  # 1 where the state before the segment depends on what others add
    ahead,
    skip,
    summed,
    chunks,
    pieces,
    block,
    listed,
    part_of_group,
    blocks_per_group,
    slices_per_group,
    N: gl.constexpr,
    PAIR: gl.constexpr,
    SLICES: gl.constexpr,
    GATED: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    DEEP: gl.constexpr,
    Y_SCALE: gl.constexpr,
    HEADS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    DEALT: gl.constexpr,
):
    head: gl.constexpr = k if HEADS == 2 else 0
    dtype: gl.constexpr = arena.dtype
    states = of_state(arena, N)
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    mbarrier.wait(begun, 0)
    p = gl.arange(0, Q, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    at = p[:, None] * N + n[None, :]
    state = gl.zeros((Q, N), gl.float32, wide)
    group = 0
    turn = 0
    EACH: gl.constexpr = PAIR * (2 if GATED else 1)  # tiles of x and z from one stage to the one before
    if SPLIT:
        FIRST_EACH: gl.constexpr = EACH if PAIR == 1 else PAIR  # tiles of x from one slot to the one before
        FIRST: gl.constexpr = arena.shape[0] - FIRST_EACH + k
        slot = 0
        phase = 0
        decay = gl.full([Q], 1.0, gl.float32, gl.SliceLayout(1, wide))
        before_segment = decay
        element: gl.constexpr = handed_ptr.dtype.element_ty
        kept = handed_ptr + parts.to(gl.int64) * (Q * N) + handed_row
        xT = _fetch(FIRST, arena, came, slot, phase, summed > skip, -FIRST_EACH, narrow)
        mbarrier.wait(known.index(group), turn)
        left, rest = _weights(nums, head, group, skip, dtype, gl.SliceLayout(0, narrow))
        part = _product(xT, rest[None, :])
        total = _numbers(nums, head, group, skip, _TOTAL).load(gl.SliceLayout(1, wide))
        for half in gl.static_range(2):  # up to where the segment begins, and on from there
            for c in range(skip if half == 0 else ahead, ahead if half == 0 else summed):
                if (c % GROUP == 0) | (c == skip):
                    decay *= total
                    state *= total[:, None]
                weighted = _sum_of_products(xT, left[None, :], part)
                sum = warpgroup_mma(weighted, states.index(slot * (3 - PAIR)).reshape([Q, N]), state, is_async=True)
                used = slot
                slot, phase = _advance(slot, phase, DEEP)
                last = (c % GROUP == GROUP - 1) | (c + 1 == summed)
                unneeded = group
                if last:
                    group, turn = _advance(group, turn, 2)
                # While the product runs, all but the last: what ptxas sees written while one runs, it waits for.
                xT = _fetch(FIRST, arena, came, slot, phase, c + 1 < summed, -FIRST_EACH, narrow)
                mbarrier.wait(known.index(group), turn, pred=c + 1 < summed)
                after = gl.where(c + 1 < summed, c + 1, c)  # where there is none after, nobody needs what is read
                there_are = gl.where(c + 1 < summed, group, unneeded)
                left, rest = _weights(nums, head, there_are, after, dtype, gl.SliceLayout(0, narrow))
                part = _product(xT, rest[None, :])
                total = _numbers(nums, head, there_are, after, _TOTAL).load(gl.SliceLayout(1, wide))
                state = warpgroup_mma_wait(0, [sum])
                mbarrier.arrive(summed_up.index(used), count=1)
                if last:
                    mbarrier.arrive(unknown.index(unneeded), count=1)
            if half == 0:
                before_segment = decay
                # what of the segment's first state this block itself has summed up
                if PAIR == 1:
                    snapshot = state
                elif (there != 0) & (ahead > 0):
                    gl.store(_places(kept, N, wide), state.to(element))
        mbarrier.arrive(walking, count=1)
        hands = (there != 0) & (seg < segments)
        if PAIR == 2:
            if not hands:
                mbarrier.arrive(going, count=1)
        if hands:
            state = _hand_over(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg,
                               segments, N, kept, before_segment, ahead, going if PAIR == 2 else None,
                               snapshot if PAIR == 1 else None, reads if DEALT else None)  # fmt: skip
    elif init_ptr is not None:
        if there != 0:
            state = gl.load(init_ptr + state_row + at).to(gl.float32)

    D = gl.zeros([Q], gl.float32, gl.SliceLayout(1, mma))
    buffer = 0
    lap = 0
    place = k
    stored = 0
    stage = 0
    phase = 0
    if SPLIT:
        stage = first_stage(summed - skip, PAIR, STAGES)
        phase = first_phase(summed - skip, PAIR, STAGES)
    AT: gl.constexpr = arena.shape[0] - EACH + k
    pairs = _packed(_fetch(AT, arena, full, stage, phase, True, -EACH, narrow))
    mbarrier.wait(known.index(group), turn)
    if SPLIT:
        for piece in range(pieces):
            now = v
            leads = seg == segments  # a leader knows the state before its first chunks
            of, nth = piece_of(block, listed, piece, DEALT)
            if DEALT:
                leads &= nth == 0
            # No branch: with one, ptxas would put the products of the loop below in an order that is slower.
            state = (state.to(gl.int32, bitcast=True) & gl.where(leads, 0, -1)).to(gl.float32, bitcast=True)
            if init_ptr is not None or PER_CHANNEL:
                _, now, second = slices_of(of, part_of_group, blocks_per_group, slices_per_group, PAIR)
                now += second * k
            if init_ptr is not None:
                row = init_ptr + state_row + (now - v).to(gl.int64) * (Q * N)
                state += gl.load(row + at, mask=leads, other=0.0).to(gl.float32)
            if PER_CHANNEL:
                D = _of_channels(D_ptr, now, stride_D_h, stride_D_p, SLICES, mma)
            to_come = (pieces - piece) * chunks
            state, pairs, group, turn, stage, phase, place, stored, buffer, lap = _walk_chunks(
                k, state, pairs, group, turn, stage, phase, place, stored, buffer, lap, chunks, to_come, D, arena, nums,
                G, owns, ys, full, known, scored, walked, unready, N, PAIR, GATED, STAGES, Y_SCALE, HEADS, PER_CHANNEL,
            )  # fmt: skip
    else:  # no loop of one piece, with which ptxas orders the products otherwise, and slower
        if PER_CHANNEL:
            D = _of_channels(D_ptr, v, stride_D_h, stride_D_p, SLICES, mma)
        state, pairs, group, turn, stage, phase, place, stored, buffer, lap = _walk_chunks(
            k, state, pairs, group, turn, stage, phase, place, stored, buffer, lap, chunks, chunks, D, arena, nums, G,
            owns, ys, full, known, scored, walked, unready, N, PAIR, GATED, STAGES, Y_SCALE, HEADS, PER_CHANNEL,
        )  # fmt: skip
    if DEALT:
        if there != 0:
            read_later(flag_ptr, seg, segments, reads)
    if STORE_FINAL:
        if there != 0:
            if seg + 1 == segments:
                gl.store(gl.max_contiguous(gl.multiple_of(final_ptr + state_row + at, [8, 8]), [1, 8]), state)
