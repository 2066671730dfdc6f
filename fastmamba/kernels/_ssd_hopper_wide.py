"""The SSD on Hopper for a state of 256: blocks of two slices of 64 channels, as in `fastmamba.kernels.ssd_hopper`.

The states of both take all the registers that two walkers can have. So C B^T comes from a launch before this one, which
works it out once for all heads of a group, and one role of four warps makes all numbers out of it and dt:

    loader     1 warp   x, B and C of a chunk into a stage; z of the chunk before
    numbers    4 warps  decays, four chunks at a time; G = (C B^T) * decay, while C B^T of the next chunk comes
    walkers    4 + 4    one slice each, the state in registers: y^T = S C^T in quarters of the state, each rounded while
                        the product with the one before runs; then y^T += x^T G^T and S = S * decay + (x w)^T B
    store      1 warp   sends y on its way from where x was

    full, walked        x, B and C of a chunk are there; the walkers are through with them, with G and z, and y is there
    stored              y is out of the place of an x
    known, unknown      the decays of four chunks are there; the walkers are through with them
    there               C B^T of a chunk is there
    scored, walked      G of a chunk is there
    gated, walked       z of a chunk is there
    walking             the walkers are through with the first pass
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

from fastmamba.kernels._ssd_hopper_halves import _product, _split, _sum_of_products, _widen
from fastmamba.kernels._ssd_hopper_handover import _hand_over, _places
from fastmamba.kernels._ssd_hopper_roles import _add, _advance, _fetch, _log2, _seen_as, _softplus, prefetch
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _LEFT,
    _SINCE,
    GROUP,
    LOG2E,
    Q,
    _load,
    _store,
    sync_threads,
)

N = gl.constexpr(256)
STAGES = gl.constexpr(2)
ROWS = gl.constexpr(4)  # that decays take in shared memory, for each head of a chunk: the last of _SINCE is the total


@gluon.jit
def _ahead(seg, segments, chunks):
    """How many chunks before its segment a block begins its first pass: as in `fastmamba.kernels.ssd_hopper`."""
    share = (2 * seg * chunks + GROUP * segments) // (2 * GROUP * segments) * GROUP
    return gl.where(chunks < GROUP * segments, 0, share)


@gluon.jit
def _numbers(nums, k: gl.constexpr, buffer, c, ROW: gl.constexpr):
    """A row of the block's head k in chunk c of a pass."""
    return nums.index(((k * 2 + buffer) * ROWS + ROW) * GROUP + c % GROUP)


@gluon.jit
def _weights(nums, k: gl.constexpr, buffer, c, dtype: gl.constexpr, layout: gl.constexpr):
    """Those of the tokens of chunk c in the state after it, in the first pass in that after four chunks: `_split`."""
    halves = _seen_as(nums, dtype, [2 * nums.shape[0], Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    at = ((k * 2 + buffer) * ROWS + _LEFT) * (2 * GROUP) + c % GROUP
    return halves.index(at).load(layout), halves.index(at + GROUP).load(layout)


@gluon.jit
def _total(nums, k: gl.constexpr, buffer, c, layout: gl.constexpr):
    """The decay over chunk c, in the first pass over its four chunks, in all rows: [1]."""
    return _numbers(nums, k, buffer, c, _SINCE).slice(Q - 1, 1).load(layout)


@gluon.jit
def _load_chunk(
    x_desc, B_desc, C_desc, xs, Bs, Cs, stored, bar, stage, b, first, v, g, i, ahead, summed,
):  # fmt: skip
    """Start copying x, B and C of chunk i of both passes into a stage."""
    t = first + gl.where(i < summed, i - ahead, i - summed) * Q
    walking = i >= summed
    mbarrier.expect(bar, (N + 2 * Q) * Q * 2, pred=i < summed)
    mbarrier.expect(bar, (2 * N + 2 * Q) * Q * 2, pred=walking)
    for k in gl.static_range(4):
        _load(C_desc, [b, t, g * N + k * Q], bar, Cs.index(4 * stage + k), pred=walking)
    _load(B_desc, [b, t, g * N], bar, Bs.index(stage))
    before = i - STAGES - summed  # the chunk whose y is where x goes
    mbarrier.wait(stored.index(stage), before // STAGES & 1, pred=before >= 0)
    for k in gl.static_range(2):
        _load(x_desc, [b, t, (v + k) * Q], bar, xs.index(2 * stage + k))


@gluon.jit
def _load_role(
    x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, walked, stored, gated, b, first, v, g, ahead, summed, chunks,
    GATED: gl.constexpr,
):  # fmt: skip
    stage = 1  # the first chunk's has been started before there were roles
    phase = 0
    for i in range(1, summed + chunks + (1 if GATED else 0)):
        mbarrier.wait(walked.index(stage), phase ^ 1)
        if GATED:  # there is room for one z, and the chunk before the last is done with it
            c = i - 1 - summed
            mbarrier.expect(gated, 2 * Q * Q * 2, pred=c >= 0)
            for k in gl.static_range(2):
                _load(z_desc, [b, first + c * Q, (v + k) * Q], gated, zs.index(k), pred=c >= 0)
        if not GATED or i < summed + chunks:
            _load_chunk(x_desc, B_desc, C_desc, xs, Bs, Cs, stored, full.index(stage), stage, b, first, v, g, i, ahead,
                        summed)  # fmt: skip
        stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _store_role(y_desc, xs, walked, stored, walking, b, first, v, second, summed, chunks, SPLIT: gl.constexpr):
    if SPLIT:
        mbarrier.wait(walking, 0)
    stage = summed % STAGES
    phase = summed // STAGES & 1
    for c in range(chunks):
        mbarrier.wait(walked.index(stage), phase)
        fence_async_shared()  # the copy engine reads what the walkers wrote, who need not wait for this fence
        _store(y_desc, [b, first + c * Q, v * Q], xs.index(2 * stage))
        if second != 0:
            _store(y_desc, [b, first + c * Q, (v + 1) * Q], xs.index(2 * stage + 1))
        tma.store_wait(0)
        mbarrier.arrive(stored.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _decays(
    k: gl.constexpr, i, first_pass, dt, bias, A, nums, halves, buffer, t, tokens, dt_min, dt_max, summed, chunk,
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, SPLIT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Those of the block's head k in the i-th four chunks of both passes, as `decays_role` works them out."""
    dt = dt.to(gl.float32) + bias
    if SOFTPLUS:
        dt = _softplus(dt)
    if CLAMP:
        dt = gl.minimum(gl.maximum(dt, dt_min), dt_max)
    dt = gl.where(t < tokens, dt, 0.0)  # past the end: no decay, no input
    cum = gl.associative_scan(dt * A, 1, _add)
    entry = cum - _log2(dt)
    last = gl.sum(dt * A, axis=1)
    since = cum
    if SPLIT:  # in the first pass the decays of later chunks of the four are part of the weights
        rest = last
        whole = last
        for j in gl.static_range(GROUP):
            later = gl.sum(gl.where(chunk == j, last, 0.0), axis=0)
            there = i * GROUP + j < summed
            rest += gl.where((chunk < j) & there, later, 0.0)
            whole += gl.where((chunk != j) & there, later, 0.0)
        last = rest
        since = gl.where(i < first_pass, cum * 0.0 + whole[:, None], cum)
    row = (k * 2 + buffer) * ROWS
    nums.index(row + _CUM).store(cum)
    nums.index(row + _ENTRY).store(entry)
    nums.index(row + _SINCE).store(gl.exp2(since))
    value, rest = _split(gl.exp2(last[:, None] - entry), dtype)
    halves.index(2 * (row + _LEFT)).store(value)
    halves.index(2 * (row + _LEFT) + 1).store(rest)


@gluon.jit
def _factor(A_ptr, head, LOG_A: gl.constexpr):
    """What dt is multiplied by for the logarithm of the decay, base 2."""
    A = gl.load(A_ptr + head).to(gl.float32)
    if LOG_A:
        A = -gl.exp(A)
    return A * LOG2E


@gluon.jit
def _numbers_role(
    dt0, dt1, A_ptr, bias_ptr, head0, head1, scores_desc, products, there, sequence, first, nums, G0, G1, known,
    unknown, scored, walked, walking, stride_dt_t, dt_min, dt_max, tokens, ahead, summed, chunks,
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, SPLIT: gl.constexpr, RELAXED: gl.constexpr, LOG_A: gl.constexpr,
    dtype: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    line: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _seen_as(nums, dtype, [4 * HEADS * ROWS, GROUP, Q], rows)
    grouped = _seen_as(nums, gl.float32, [2 * HEADS * ROWS, GROUP, Q], rows)
    chunk = gl.arange(0, GROUP, gl.SliceLayout(1, line))
    q = chunk[:, None] * Q + gl.arange(0, Q, gl.SliceLayout(0, line))[None, :]  # [GROUP, Q]
    first_pass = (summed + GROUP - 1) // GROUP
    groups = first_pass + (chunks + GROUP - 1) // GROUP
    after = gl.where(0 < first_pass, -ahead, 0) * Q + q
    coming0 = gl.load(dt0 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
    A0 = _factor(A_ptr, head0, LOG_A)
    bias0 = 0.0
    if bias_ptr is not None:
        bias0 = gl.load(bias_ptr + head0).to(gl.float32)
    if HEADS == 2:
        coming1 = gl.load(dt1 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
        A1 = _factor(A_ptr, head1, LOG_A)
        bias1 = 0.0
        if bias_ptr is not None:
            bias1 = gl.load(bias_ptr + head1).to(gl.float32)

    PART: gl.constexpr = 16  # rows of G at a time: there are few registers
    PLACES: gl.constexpr = G0.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, PART, gl.SliceLayout(1, layout))
    s = gl.arange(0, Q, gl.SliceLayout(0, layout))
    mbarrier.expect(there, Q * Q * 4)
    _load(scores_desc, [sequence, first, 0], there, products)
    # G lags two chunks behind, so that nobody waits for the decays of the next four.
    for i in range(groups + 1):
        if i < groups:
            buffer = i & 1
            mbarrier.wait(unknown.index(buffer), (i // 2 & 1) ^ 1)
            at = after
            after = gl.where(i + 1 < first_pass, (i + 1) * GROUP - ahead, (i + 1 - first_pass) * GROUP) * Q + q
            dt = coming0
            coming0 = gl.load(dt0 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
            _decays(0, i, first_pass, dt, bias0, A0, grouped, halves, buffer, at, tokens, dt_min, dt_max, summed, chunk,
                    SOFTPLUS, CLAMP, SPLIT, dtype)  # fmt: skip
            if HEADS == 2:
                dt = coming1
                coming1 = gl.load(dt1 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
                _decays(1, i, first_pass, dt, bias1, A1, grouped, halves, buffer, at, tokens, dt_min, dt_max, summed,
                        chunk, SOFTPLUS, CLAMP, SPLIT, dtype)  # fmt: skip
            mbarrier.arrive(known.index(buffer), count=1)
        if SPLIT:
            mbarrier.wait(walking, 0, pred=i == first_pass)
        begin = gl.maximum((i - first_pass) * GROUP - 2, 0)
        for c in range(begin, gl.minimum(gl.maximum((i - first_pass) * GROUP + 2, 0), chunks)):
            group = (first_pass + c // GROUP) & 1
            before = summed + c - PLACES  # the chunk whose G was in the same place
            mbarrier.wait(walked.index(before % STAGES), before // STAGES & 1, pred=c >= PLACES)
            mbarrier.wait(there, c & 1)
            for part in gl.static_range(Q // PART):
                scores = products.reshape([Q, Q]).slice(part * PART, PART).load(layout)  # [t, s]
                causal = (t + part * PART)[:, None] >= s[None, :]
                for k in gl.static_range(HEADS):
                    cum = _numbers(nums, k, group, c, _CUM).slice(part * PART, PART).load(gl.SliceLayout(1, layout))
                    entry = _numbers(nums, k, group, c, _ENTRY).load(gl.SliceLayout(0, layout))
                    decay = gl.exp2(cum[:, None] - entry[None, :])  # above the diagonal it may be infinite
                    if RELAXED:
                        G = gl.where(causal, scores.to(dtype) * decay.to(dtype), 0.0)
                    else:
                        G = gl.where(causal, scores * decay, 0.0)
                    place = (G0 if k == 0 else G1).index(c % PLACES)
                    place.slice(part * PART, PART).store(G.to(dtype))
            fence_async_shared()
            mbarrier.arrive(scored.index(c % PLACES), count=1)
            mbarrier.expect(there, Q * Q * 4, pred=c + 1 < chunks)
            _load(scores_desc, [sequence, first + (c + 1) * Q, 0], there, products, pred=c + 1 < chunks)


@gluon.jit
def _silu(z):
    """z / (1 + exp(-z)) in five instructions; exact division takes fifteen."""
    return gl.inline_asm_elementwise(
        "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; add.f32 e, e, 0f3F800000;"
        " rcp.approx.ftz.f32 e, e; mul.f32 $0, $1, e;}",
        "=r,r",
        [z],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _columns(v, W: gl.constexpr):
    """The first and the last columns of [Q, W]."""
    return v.reshape([Q, 2, W // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _walk_role(
    k: gl.constexpr,
    D_ptr, D_at, init_ptr, final_ptr, handed_ptr, passed_ptr, flag_ptr, xs, Bs, Cs, zs, nums, G, full, known, unknown,
    scored, walked, gated, walking,
    there,  # whether the slice is: a group of an odd number of slices leaves one over
    state_row, handed_row,
    parts,  # of all blocks
    stride_D_p, seg, segments, ahead, summed, chunks,
    GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr, Y_SCALE: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    head: gl.constexpr = k if HEADS == 2 else 0
    dtype: gl.constexpr = Bs.dtype
    PLACES: gl.constexpr = G.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    # ptxas takes no product of 256 columns in a kernel of 512 threads
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    p = gl.arange(0, Q, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    at = p[:, None] * N + n[None, :]
    state = gl.zeros((Q, N), gl.float32, wide)
    stage = 0
    phase = 0
    group = 0
    turn = 0
    if SPLIT:
        decay = gl.full([Q], 1.0, gl.float32, gl.SliceLayout(1, wide))
        before_segment = decay
        element: gl.constexpr = handed_ptr.dtype.element_ty
        kept = handed_ptr + parts.to(gl.int64) * (Q * N) + handed_row
        xT = _fetch(k, xs, full, stage, phase, summed > 0, 2, narrow)
        mbarrier.wait(known.index(group), turn, pred=summed > 0)
        left, rest = _weights(nums, head, group, 0, dtype, gl.SliceLayout(0, narrow))
        part = _product(xT, rest[None, :])
        total = _total(nums, head, group, 0, gl.SliceLayout(1, wide))
        for half in gl.static_range(2):  # up to where the segment begins, and on from there
            for c in range(0 if half == 0 else ahead, ahead if half == 0 else summed):
                if c % GROUP == 0:
                    decay *= total
                    state *= total[:, None]
                weighted = _sum_of_products(xT, left[None, :], part)
                sum = warpgroup_mma(weighted, Bs.index(stage).reshape([Q, N]), state, is_async=True)
                used = stage
                stage, phase = _advance(stage, phase, STAGES)
                last = (c % GROUP == GROUP - 1) | (c + 1 == summed)
                unneeded = group
                if last:
                    group, turn = _advance(group, turn, 2)
                state = warpgroup_mma_wait(0, [sum])
                mbarrier.arrive(walked.index(used), count=1)
                xT = _fetch(k, xs, full, stage, phase, c + 1 < summed, 2, narrow)
                mbarrier.wait(known.index(group), turn, pred=c + 1 < summed)
                left, rest = _weights(nums, head, group, c + 1, dtype, gl.SliceLayout(0, narrow))
                part = _product(xT, rest[None, :])
                total = _total(nums, head, group, c + 1, gl.SliceLayout(1, wide))
                if last:
                    mbarrier.arrive(unknown.index(unneeded), count=1)
            if half == 0:
                before_segment = decay
                if (there != 0) & (ahead > 0):  # what of the segment's first state this block itself has summed up
                    gl.store(_places(kept, N, wide), state.to(element))
        mbarrier.arrive(walking, count=1)
        if there != 0:
            state = _hand_over(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg,
                               segments, N)  # fmt: skip
            if ahead > 0:
                state = state * before_segment[:, None] + gl.load(_places(kept, N, wide)).to(gl.float32)
    elif init_ptr is not None:
        if there != 0:
            state = gl.load(init_ptr + state_row + at).to(gl.float32)

    if D_ptr is not None:
        D = gl.load(D_ptr + D_at + gl.arange(0, Q, gl.SliceLayout(1, mma)) * stride_D_p).to(gl.float32)
    for c in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.wait(known.index(group), turn, pred=c % GROUP == 0)
        total = _total(nums, head, group, c, gl.SliceLayout(1, wide))
        y = gl.zeros((Q, Q), gl.float32, mma)
        for half in gl.static_range(2):
            for quarter in gl.static_range(2):
                before = _columns(_columns(state, N)[half], N // 2)[quarter]
                before = gl.convert_layout(before.to(dtype), narrow)
                C = Cs.index(4 * stage + 2 * half + quarter).reshape([Q, Q])
                y = warpgroup_mma(before, C.permute([1, 0]), y, use_acc=half + quarter > 0, is_async=True)
                if half + quarter > 0:  # there are registers for two
                    y = warpgroup_mma_wait(1, [y])
        state *= total[:, None]
        y = warpgroup_mma_wait(0, [y])
        xT = xs.index(stage * 2 + k).reshape([Q, Q]).permute([1, 0]).load(narrow)
        left, rest = _weights(nums, head, group, c, dtype, gl.SliceLayout(0, narrow))
        weighted = _sum_of_products(xT, left[None, :], _product(xT, rest[None, :]))
        y = y * _numbers(nums, head, group, c, _SINCE).load(gl.SliceLayout(0, mma))[None, :]
        if D_ptr is not None:
            y += gl.convert_layout(_widen(xT), mma) * D[:, None]
        mbarrier.wait(scored.index(c % PLACES), c // PLACES & 1)
        y = warpgroup_mma(xT, G.index(c % PLACES).permute([1, 0]), y, is_async=True)
        sum = warpgroup_mma(weighted, Bs.index(stage).reshape([Q, N]), state, is_async=True)
        y = warpgroup_mma_wait(1, [y])
        # in the shadow of the state's product
        if GATED:
            mbarrier.wait(gated, c & 1)
            z = zs.index(k).reshape([Q, Q]).permute([1, 0]).load(narrow)
            y *= _silu(gl.convert_layout(z, mma).to(gl.float32))
        xs.index(stage * 2 + k).reshape([Q, Q]).permute([1, 0]).store((y * Y_SCALE).to(dtype))
        state = warpgroup_mma_wait(0, [sum])
        mbarrier.arrive(walked.index(stage), count=1)
        if c % GROUP == GROUP - 1:
            mbarrier.arrive(unknown.index(group), count=1)
            group, turn = _advance(group, turn, 2)
        stage, phase = _advance(stage, phase, STAGES)
    if STORE_FINAL:
        if there != 0:
            if seg + 1 == segments:
                gl.store(gl.max_contiguous(gl.multiple_of(final_ptr + state_row + at, [8, 8]), [1, 8]), state)


_SIZES = ["T", "slices", "slices_per_group", "blocks_per_group", "groups", "segments", "chunks_per_segment"]
_STRIDES = ["stride_dt_b", "stride_dt_t", "stride_dt_h", "stride_D_h", "stride_D_p"]


@gluon.jit(do_not_specialize=_SIZES + _STRIDES)
def wide_kernel(
    dt_ptr, x_desc, B_desc, C_desc, z_desc, y_desc, A_ptr, D_ptr, bias_ptr, init_ptr, final_ptr, handed_ptr, sync_ptr,
    scores_desc,  # C B^T of all chunks, (batch * groups, chunks * t, s)
    T,
    slices,  # of 64 channels, in all heads
    slices_per_group,
    blocks_per_group,
    groups,
    segments,
    chunks_per_segment,
    dt_min, dt_max, stride_dt_b, stride_dt_t, stride_dt_h, stride_D_h, stride_D_p,
    SLICES: gl.constexpr,  # of one head
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr,
    RELAXED: gl.constexpr, LOG_A: gl.constexpr, Y_SCALE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    HEADS: gl.constexpr = 2 if SLICES % 2 == 1 else 1  # two slices of one head share all but x
    PLACES: gl.constexpr = 1 if GATED and HEADS == 2 else 2  # for G of a head: shared memory is full
    if SPLIT:
        ticket = gl.atomic_add(sync_ptr, 1, sem="relaxed")
        if ticket + 1 == gl.num_programs(0):
            gl.store(sync_ptr, 0)  # everybody has one: left as it was found
    else:
        ticket = gl.program_id(0)
    blocks = groups * blocks_per_group
    rest = ticket // blocks
    seg = rest % segments
    b = rest // segments
    g = ticket % blocks // blocks_per_group
    place = ticket % blocks_per_group * 2
    v = g * slices_per_group + place
    second = (place + 1 < slices_per_group).to(gl.int32)

    first_chunk = seg * chunks_per_segment
    first = first_chunk * Q
    total = (T + Q - 1) // Q
    last = seg + 1 == segments
    chunks = gl.where(last, total - first_chunk, chunks_per_segment)  # the last one takes what is left
    ahead = _ahead(seg, segments, chunks_per_segment)
    summed = ahead + gl.where(last, 0, chunks - _ahead(seg + 1, segments, chunks_per_segment))
    tokens = T - first
    head0 = v // SLICES
    v1 = v + second
    head1 = v1 // SLICES

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    lone: gl.constexpr = mbarrier.MBarrierLayout()
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, 1, Q, Q], tile)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], tile)
    Cs = gl.allocate_shared_memory(dtype, [STAGES * 4, 1, Q, Q], tile)
    zs = xs
    if GATED:
        zs = gl.allocate_shared_memory(dtype, [2, 1, Q, Q], tile)
    products = gl.allocate_shared_memory(gl.float32, [1, Q, Q], gl.NVMMASharedLayout(128, 32, rank=3))
    G0 = gl.allocate_shared_memory(dtype, [PLACES, Q, Q], square)
    G1 = G0
    if HEADS == 2:
        G1 = gl.allocate_shared_memory(dtype, [PLACES, Q, Q], square)
    nums = gl.allocate_shared_memory(gl.float32, [2 * HEADS * ROWS * GROUP, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    walked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    stored = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    known = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    unknown = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    there = gl.allocate_shared_memory(gl.int64, [1], lone)
    gated = gl.allocate_shared_memory(gl.int64, [1], lone)
    walking = gl.allocate_shared_memory(gl.int64, [1], lone)
    dt_at = dt_ptr + b.to(gl.int64) * stride_dt_b + first.to(gl.int64) * stride_dt_t
    dt0 = dt_at + head0 * stride_dt_h
    dt1 = dt_at + head1 * stride_dt_h
    # What the first chunk waits for is on its way before anything else: dt, then x, B and C.
    early = gl.arange(0, GROUP * Q, gl.BlockedLayout([1], [32], [4], [0])) - ahead * Q
    early = gl.minimum(early, tokens - 1)
    prefetch(dt0 + early.to(gl.int64) * stride_dt_t)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    sync_threads()
    _load_chunk(x_desc, B_desc, C_desc, xs, Bs, Cs, stored, full.index(0), 0, b, first, v, g, 0, ahead, summed)
    for i in gl.static_range(STAGES):
        mbarrier.init(walked.index(i), count=2)  # the walkers
        mbarrier.init(stored.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(unknown.index(i), count=2)  # the walkers
        mbarrier.init(scored.index(i), count=1)
    mbarrier.init(there, count=1)
    mbarrier.init(gated, count=1)
    mbarrier.init(walking, count=2)
    fence_async_shared()
    sync_threads()

    state_row = (b.to(gl.int64) * slices + v) * (Q * N)
    state_row1 = (b.to(gl.int64) * slices + v1) * (Q * N)
    handed_row = ((b.to(gl.int64) * slices + v) * segments + seg) * (Q * N)
    handed_row1 = ((b.to(gl.int64) * slices + v1) * segments + seg) * (Q * N)
    # behind what is handed over and what blocks keep for themselves: the decay over each first pass, float32
    parts = gl.num_programs(0) // (blocks * segments) * slices * segments
    passed = (handed_ptr + parts.to(gl.int64) * (2 * Q * N)).to(gl.pointer_type(gl.float32), bitcast=True)
    passed += (b * slices + v) * segments + seg
    passed1 = passed + (v1 - v) * segments
    flag = sync_ptr + 1 + (b * slices + v) * segments + seg
    flag1 = sync_ptr + 1 + (b * slices + v1) * segments + seg
    D0 = head0 * stride_D_h + v % SLICES * Q * stride_D_p
    D1 = head1 * stride_D_h + v1 % SLICES * Q * stride_D_p

    # fmt: off
    gl.warp_specialize(
        [
            (_numbers_role, (dt0, dt1, A_ptr, bias_ptr, head0, head1, scores_desc, products, there, b * groups + g,
                             first, nums, G0, G1, known, unknown, scored, walked, walking, stride_dt_t, dt_min, dt_max,
                             tokens, ahead, summed, chunks, SOFTPLUS, CLAMP, SPLIT, RELAXED, LOG_A, dtype, HEADS)),
            (_walk_role, (gl.constexpr(0), D_ptr, D0, init_ptr, final_ptr, handed_ptr, passed, flag, xs, Bs, Cs, zs,
                          nums, G0, full, known, unknown, scored, walked, gated, walking, second * 0 + 1, state_row,
                          handed_row, parts, stride_D_p, seg, segments, ahead, summed, chunks, GATED, STORE_FINAL,
                          SPLIT, Y_SCALE, HEADS)),
            (_walk_role, (gl.constexpr(1), D_ptr, D1, init_ptr, final_ptr, handed_ptr, passed1, flag1, xs, Bs, Cs, zs,
                          nums, G1, full, known, unknown, scored, walked, gated, walking, second, state_row1,
                          handed_row1, parts, stride_D_p, seg, segments, ahead, summed, chunks, GATED, STORE_FINAL,
                          SPLIT, Y_SCALE, HEADS)),
            (_load_role, (x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, walked, stored, gated, b, first, v, g,
                          ahead, summed, chunks, GATED)),
            (_store_role, (y_desc, xs, walked, stored, walking, b, first, v, second, summed, chunks, SPLIT)),
        ],
        [4, 4, 1, 1],
        [224, 224, 24, 24],
    )
    # fmt: on
