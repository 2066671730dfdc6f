"""The SSD on Hopper for a state of 256: a block walks one slice of 64 channels, by two walkers of half a state each.

The roles and their meetings are those of `fastmamba.kernels._ssd_hopper_roles`, but for

    walkers    4 + 4    walker k holds columns 128 k to 128 k + 127 of the state; y^T = S C^T is the sum of the two.
                        Walker 1 adds x^T G^T to its part and hands that over in shared memory, in float32; walker 0
                        adds its own part and D x, gates, and sends y on its way
    decays     1 + 1    take turns at groups of four chunks

    full, empty        x, B and C of a chunk are there; the products that read them are through
    gated, ungated     z of a chunk, which is needed later, is there; walker 0 has read it
    scored, unscored   G of a chunk is there; walker 1 has multiplied with it
    given, taken       walker 1's part of y is there; walker 0 has read it
    ready, unready     y is there; it is on its way to global memory

Shared memory is full: two stages of x, B and C are 144 KiB of it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_halves import _packed, _rounded, _unpacked
from fastmamba.kernels._ssd_hopper_handover import _hand_over
from fastmamba.kernels._ssd_hopper_roles import _advance, _numbers, _weigh, decays_role, prefetch
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _SINCE,
    _TOTAL,
    GROUP,
    LOG2E,
    ROWS,
    Q,
    _load,
    _store,
    sync_threads,
)

HALF = gl.constexpr(128)  # columns of the state that a walker holds


@gluon.jit
def _load_chunk(x_desc, B_desc, C_desc, xs, Bs, Cs, bar, stage, b, first, v, g, i, summed):
    """Start copying x, B and C, in halves, of chunk i of both passes into a stage."""
    t = first + gl.where(i < summed, i, i - summed) * Q
    walking = i >= summed
    mbarrier.expect(bar, (2 * HALF + Q) * Q * 2, pred=i < summed)
    mbarrier.expect(bar, (4 * HALF + Q) * Q * 2, pred=walking)
    _load(x_desc, [b, t, v * Q], bar, xs.index(stage))
    for k in gl.static_range(2):
        _load(B_desc, [b, t, (2 * g + k) * HALF], bar, Bs.index(2 * stage + k))
    for k in gl.static_range(2):
        _load(C_desc, [b, t, (2 * g + k) * HALF], bar, Cs.index(2 * stage + k), pred=walking)


@gluon.jit
def _load_role(
    x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, empty, gated, ungated, b, first, v, g, summed, chunks,
    GATED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # The first chunk has been started before there were roles.
    stage = 1
    phase = 0
    place = 0
    lap = 0
    for i in range(summed + chunks):
        if i > 0:
            mbarrier.wait(empty.index(stage), phase ^ 1)
            _load_chunk(x_desc, B_desc, C_desc, xs, Bs, Cs, full.index(stage), stage, b, first, v, g, i, summed)
            stage, phase = _advance(stage, phase, STAGES)
        if GATED:
            if i >= summed:
                mbarrier.wait(ungated.index(place), lap ^ 1)
                mbarrier.expect(gated.index(place), Q * Q * 2)
                _load(z_desc, [b, first + (i - summed) * Q, v * Q], gated.index(place), zs.index(place))
                place, lap = _advance(place, lap, 2)


@gluon.jit
def _scores_role(
    Bs, Cs, nums, Gs, full, empty, known, unknown, scored, unscored, walking, summed, chunks,
    RELAXED: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Bs.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    t = gl.arange(0, Q, gl.SliceLayout(1, mma))
    s = gl.arange(0, Q, gl.SliceLayout(0, mma))
    causal = _packed(gl.where(t[:, None] >= s[None, :], -1, 0).to(gl.int16))
    if SPLIT:
        mbarrier.wait(walking, 0)
    stage = summed % STAGES
    phase = summed // STAGES & 1
    groups = (summed + GROUP - 1) // GROUP
    group = groups & 1
    turn = groups // 2 & 1
    buffer = 0
    lap = 0
    for c in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        products = gl.zeros((Q, Q), gl.float32, mma)
        for k in gl.static_range(2):
            C = Cs.index(2 * stage + k).reshape([Q, HALF])
            B = Bs.index(2 * stage + k).reshape([Q, HALF])
            products = warpgroup_mma(C, B.permute([1, 0]), products, use_acc=k > 0, is_async=True)
        mbarrier.wait(known.index(group), turn)
        mbarrier.wait(unscored.index(buffer), lap ^ 1)
        scores = warpgroup_mma_wait(0, [products])  # [t, s]
        mbarrier.arrive(empty.index(stage), count=1)
        cum = _numbers(nums, 0, group, c, _CUM).load(gl.SliceLayout(1, mma))
        entry = _numbers(nums, 0, group, c, _ENTRY).load(gl.SliceLayout(0, mma))
        decay = gl.exp2(cum[:, None] - entry[None, :])
        if RELAXED:
            G = _packed((scores + 0.0).to(dtype) * decay.to(dtype))  # as in scores_role
        else:
            G = _rounded(scores * decay, dtype)
        Gs.index(buffer).store(_unpacked(G & causal, dtype, mma))  # as in scores_role
        fence_async_shared()
        mbarrier.arrive(scored.index(buffer), count=1)
        stage, phase = _advance(stage, phase, STAGES)
        if c % GROUP == GROUP - 1:
            mbarrier.arrive(unknown.index(group), count=1)
            group, turn = _advance(group, turn, 2)
        buffer, lap = _advance(buffer, lap, 2)


@gluon.jit
def _fetch(xs, full, stage, phase, there, layout: gl.constexpr):
    """x^T [P, Q] of a chunk in registers; anything, where `there` says that it is not there."""
    mbarrier.wait(full.index(stage), phase, pred=there)
    return xs.index(stage).reshape([Q, Q]).permute([1, 0]).load(layout)


@gluon.jit
def _store_role(y_desc, ys, ready, unready, b, first, v, chunks):
    place = 0
    lap = 0
    for c in range(chunks):
        mbarrier.wait(ready.index(place), lap)
        fence_async_shared()  # the copy engine reads what the walker wrote, who need not wait for this fence
        _store(y_desc, [b, first + c * Q, v * Q], ys.index(place))
        tma.store_wait(0)
        mbarrier.arrive(unready.index(place), count=1)
        place, lap = _advance(place, lap, 2)


@gluon.jit
def _walk_role(
    k: gl.constexpr,  # which half
    D_ptr, D_at, init_ptr, final_ptr, handed_ptr, passed_ptr, flag_ptr, xs, Bs, Cs, zs, nums, Gs, parts, ys, full,
    empty, gated, ungated, known, unknown, scored, unscored, given, taken, ready, unready, walking, state_row,
    handed_row, stride_D_p, seg, segments, summed, chunks,
    GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    Y_SCALE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = Bs.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    narrow_state: gl.constexpr = gl.DotOperandLayout(0, wide, 2)

    p = gl.arange(0, Q, gl.SliceLayout(1, wide))
    n = gl.arange(0, HALF, gl.SliceLayout(0, wide))
    at = p[:, None] * (2 * HALF) + k * HALF + n[None, :]
    state = gl.zeros((Q, HALF), gl.float32, wide)
    stage = 0
    phase = 0
    group = 0
    turn = 0
    if SPLIT:
        decay = gl.full([Q], 1.0, gl.float32, gl.SliceLayout(1, wide))
        xT = _fetch(xs, full, stage, phase, summed > 0, narrow)
        for g in range((summed + GROUP - 1) // GROUP):  # what this segment alone adds to the state
            mbarrier.wait(known.index(group), turn)
            total = _numbers(nums, 0, group, 0, _TOTAL).load(gl.SliceLayout(1, wide))
            decay *= total
            state *= total[:, None]
            for c in range(g * GROUP, gl.minimum(g * GROUP + GROUP, summed)):
                weighted = _weigh(0, xT, nums, group, c)
                sum = warpgroup_mma(weighted, Bs.index(2 * stage + k).reshape([Q, HALF]), state, is_async=True)
                used = stage
                stage, phase = _advance(stage, phase, STAGES)
                # while the product runs
                xT = _fetch(xs, full, stage, phase, c + 1 < summed, narrow)
                state = warpgroup_mma_wait(0, [sum])
                mbarrier.arrive(empty.index(used), count=2 if k == 0 else 1)  # for the scores, too
            mbarrier.arrive(unknown.index(group), count=2 if k == 0 else 1)
            group, turn = _advance(group, turn, 2)
        mbarrier.arrive(walking, count=1)
        state = _hand_over(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg,
                           segments, HALF)  # fmt: skip
    elif init_ptr is not None:
        state = gl.load(init_ptr + state_row + at).to(gl.float32)

    if k == 0:
        if D_ptr is not None:
            rows = gl.arange(0, Q, gl.SliceLayout(1, mma))
            D = gl.load(D_ptr + D_at + rows * stride_D_p).to(gl.float32)
    buffer = 0
    lap = 0
    part = 0
    times = 0
    xT = _fetch(xs, full, stage, phase, True, narrow)
    mbarrier.wait(known.index(group), turn)
    weighted = _weigh(0, xT, nums, group, 0)
    total = _numbers(nums, 0, group, 0, _TOTAL).load(gl.SliceLayout(1, wide))
    for c in range(chunks):
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        before = gl.convert_layout(state.to(dtype), narrow_state)
        state *= total[:, None]
        C = Cs.index(2 * stage + k).reshape([Q, HALF])
        # The state needs nothing of y: both products are under way before either is waited for.
        y = warpgroup_mma(before, C.permute([1, 0]), zeros, use_acc=False, is_async=True)
        sum = warpgroup_mma(weighted, Bs.index(2 * stage + k).reshape([Q, HALF]), state, is_async=True)
        y = warpgroup_mma_wait(1, [y])
        y *= _numbers(nums, 0, group, c, _SINCE).load(gl.SliceLayout(0, mma))[None, :]
        used = stage
        if k == 0:
            if D_ptr is not None:
                y += gl.convert_layout(xT, mma).to(gl.float32) * D[:, None]
            state = warpgroup_mma_wait(0, [sum])
        else:
            mbarrier.wait(scored.index(buffer), lap)
            state = warpgroup_mma_wait(0, [sum])
            y = warpgroup_mma(xT, Gs.index(buffer).permute([1, 0]), y, is_async=True)
        # in its shadow, or while walker 1 is at it: the next chunk's x comes
        mbarrier.arrive(empty.index(used), count=1)
        if c % GROUP == GROUP - 1:
            mbarrier.arrive(unknown.index(group), count=1)
            group, turn = _advance(group, turn, 2)
        stage, phase = _advance(stage, phase, STAGES)
        nextT = _fetch(xs, full, stage, phase, c + 1 < chunks, narrow)
        mbarrier.wait(known.index(group), turn, pred=c + 1 < chunks)
        if k == 0:
            if GATED:
                mbarrier.wait(gated.index(buffer), lap)
                z = zs.index(buffer).reshape([Q, Q]).permute([1, 0]).load(narrow)
                z = gl.convert_layout(z, mma).to(gl.float32)
                mbarrier.arrive(ungated.index(buffer), count=1)
            mbarrier.wait(given.index(part), times)
            y += parts.index(part).load(mma)
            mbarrier.arrive(taken.index(part), count=1)
            if GATED:
                y *= z / (1.0 + gl.exp2(-LOG2E * z))
            mbarrier.wait(unready.index(buffer), lap ^ 1)
            ys.index(buffer).reshape([Q, Q]).permute([1, 0]).store((y * Y_SCALE).to(dtype))
            mbarrier.arrive(ready.index(buffer), count=1)
        else:
            y = warpgroup_mma_wait(0, [y])
            mbarrier.arrive(unscored.index(buffer), count=1)
            mbarrier.wait(taken.index(part), times ^ 1)
            parts.index(part).store(y)
            mbarrier.arrive(given.index(part), count=1)
        part, times = _advance(part, times, PARTS)
        xT = nextT
        # Here, not while the product runs: ptxas would serialise the products.
        weighted = _weigh(0, xT, nums, group, c + 1)
        total = _numbers(nums, 0, group, c + 1, _TOTAL).load(gl.SliceLayout(1, wide))
        buffer, lap = _advance(buffer, lap, 2)
    if STORE_FINAL:
        if seg + 1 == segments:
            gl.store(final_ptr + state_row + at, state)


_SIZES = ["T", "slices", "slices_per_group", "blocks_per_group", "groups", "segments", "chunks_per_segment"]
_STRIDES = ["stride_dt_b", "stride_dt_t", "stride_dt_h", "stride_D_h", "stride_D_p"]


@gluon.jit(do_not_specialize=_SIZES + _STRIDES)
def wide_kernel(
    dt_ptr, x_desc, B_desc, C_desc, z_desc, y_desc, A_ptr, D_ptr, bias_ptr, init_ptr, final_ptr, handed_ptr, sync_ptr,
    T,
    slices,  # of 64 channels, in all heads
    slices_per_group,
    blocks_per_group,  # as many
    groups,
    segments,
    chunks_per_segment,
    dt_min, dt_max, stride_dt_b, stride_dt_t, stride_dt_h, stride_D_h, stride_D_p,
    SLICES: gl.constexpr,  # of one head
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr,
    RELAXED: gl.constexpr, LOG_A: gl.constexpr, Y_SCALE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    STAGES: gl.constexpr = 2
    PARTS: gl.constexpr = 1 if GATED else 2
    if SPLIT:
        ticket = gl.atomic_add(sync_ptr, 1, sem="relaxed")
        if ticket + 1 == gl.num_programs(0):
            gl.store(sync_ptr, 0)  # everybody has one: left as it was found
    else:
        ticket = gl.program_id(0)
    seg = ticket // slices % segments
    b = ticket // slices // segments
    v = ticket % slices
    g = v // slices_per_group

    first_chunk = seg * chunks_per_segment
    first = first_chunk * Q
    total = (T + Q - 1) // Q
    last = seg + 1 == segments
    chunks = gl.where(last, total - first_chunk, chunks_per_segment)  # the last one takes what is left
    summed = gl.where(last, 0, chunks)
    tokens = T - first
    head = v // SLICES

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    lone: gl.constexpr = mbarrier.MBarrierLayout()
    xs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, Q], tile)
    Bs = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, Q, HALF], tile)
    Cs = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, Q, HALF], tile)
    zs = xs
    if GATED:
        zs = gl.allocate_shared_memory(dtype, [2, 1, Q, Q], tile)
    Gs = gl.allocate_shared_memory(dtype, [2, Q, Q], square)
    parts = gl.allocate_shared_memory(gl.float32, [PARTS, Q, Q], gl.NVMMASharedLayout(128, 32, rank=2))
    ys = gl.allocate_shared_memory(dtype, [2, 1, Q, Q], tile)
    nums = gl.allocate_shared_memory(gl.float32, [2 * ROWS * GROUP, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    gated = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    ungated = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    known = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    unknown = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    walking = gl.allocate_shared_memory(gl.int64, [1], lone)
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    unscored = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    given = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    unready = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    dt_at = dt_ptr + b.to(gl.int64) * stride_dt_b + first.to(gl.int64) * stride_dt_t + head * stride_dt_h
    # What the first chunk waits for is on its way before anything else: dt, then x, B and C.
    early = gl.minimum(gl.arange(0, GROUP * Q, gl.BlockedLayout([1], [32], [4], [0])), tokens - 1)
    prefetch(dt_at + early.to(gl.int64) * stride_dt_t)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    sync_threads()
    _load_chunk(x_desc, B_desc, C_desc, xs, Bs, Cs, full.index(0), 0, b, first, v, g, 0, summed)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=3)  # the scores and the walkers
    mbarrier.init(walking, count=2)
    for i in gl.static_range(2):
        mbarrier.init(gated.index(i), count=1)
        mbarrier.init(ungated.index(i), count=1)
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(unknown.index(i), count=3)  # the scores and the walkers
        mbarrier.init(scored.index(i), count=1)
        mbarrier.init(unscored.index(i), count=1)
        mbarrier.init(given.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(unready.index(i), count=1)
    fence_async_shared()
    sync_threads()

    state_row = (b.to(gl.int64) * slices + v) * (Q * 2 * HALF)
    # of the first half; the other one's walk is a row of its own
    walk = (b * slices + v) * 2 * segments + seg
    handed_row = walk.to(gl.int64) * (Q * HALF)
    other_row = handed_row + segments * (Q * HALF)
    # behind what is handed over: the decay over each segment, float32
    handed = gl.num_programs(0) * 2
    passed = (handed_ptr + handed.to(gl.int64) * (Q * HALF)).to(gl.pointer_type(gl.float32), bitcast=True) + walk
    flag = sync_ptr + 1 + walk
    D_at = head * stride_D_h + v % SLICES * Q * stride_D_p

    # fmt: off
    gl.warp_specialize(
        [
            (_scores_role, (Bs, Cs, nums, Gs, full, empty, known, unknown, scored, unscored, walking, summed, chunks,
                            RELAXED, SPLIT, STAGES)),
            (_walk_role, (gl.constexpr(0), D_ptr, D_at, init_ptr, final_ptr, handed_ptr, passed, flag, xs, Bs, Cs, zs,
                          nums, Gs, parts, ys, full, empty, gated, ungated, known, unknown, scored, unscored, given,
                          taken, ready, unready, walking, state_row, handed_row, stride_D_p, seg, segments, summed,
                          chunks, GATED, STORE_FINAL, SPLIT, STAGES, PARTS, Y_SCALE)),
            (_walk_role, (gl.constexpr(1), D_ptr, D_at, init_ptr, final_ptr, handed_ptr, passed + segments,
                          flag + segments, xs, Bs, Cs, zs, nums, Gs, parts, ys, full, empty, gated, ungated, known,
                          unknown, scored, unscored, given, taken, ready, unready, walking, state_row, other_row,
                          stride_D_p, seg, segments, summed, chunks, GATED, STORE_FINAL, SPLIT, STAGES, PARTS,
                          Y_SCALE)),
            (_load_role, (x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, empty, gated, ungated, b, first, v, g,
                          summed, chunks, GATED, STAGES)),
            (decays_role, (gl.constexpr(0), dt_at, A_ptr, bias_ptr, head, nums, known, unknown, stride_dt_t, dt_min,
                           dt_max, tokens, gl.constexpr(0), summed, chunks, SOFTPLUS, CLAMP, gl.constexpr(2), SPLIT,
                           LOG_A, gl.constexpr(1), dtype)),
            (decays_role, (gl.constexpr(1), dt_at, A_ptr, bias_ptr, head, nums, known, unknown, stride_dt_t, dt_min,
                           dt_max, tokens, gl.constexpr(0), summed, chunks, SOFTPLUS, CLAMP, gl.constexpr(2), SPLIT,
                           LOG_A, gl.constexpr(1), dtype)),
            (_store_role, (y_desc, ys, ready, unready, b, first, v, chunks)),
        ],
        [4, 4, 1, 1, 1, 1],
        [192, 192, 56, 56, 56, 56],
    )
    # fmt: on
