"""What the warps of a block do in the Hopper SSD; `fastmamba.kernels.ssd_hopper` has the picture and the launch.

The roles meet at mbarriers in shared memory, in pairs, one for each direction:

    full, walked       a stage holds a chunk of x, B, C and z; the walkers are through with the chunk
    known, unknown     the decays of four chunks are there; nobody needs them any more
    scored, walked     G of a chunk, and what each token adds to its own output, are there
    walked, unready    y of a chunk is there; it is on its way to global memory
    walking            the walkers are through with the first pass (in which the scores and the store have no part)
    begun              the barriers are initialised, by the scores
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_halves import (
    _packed,
    _product,
    _rounded,
    _split,
    _sum_of_products,
    _unpacked,
    _widen,
)
from fastmamba.kernels._ssd_hopper_handover import _hand_over, _places
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _LEFT,
    _SINCE,
    _TOTAL,
    EARLY,
    GROUP,
    LOG2E,
    RENAMED,
    ROWS,
    Q,
    _load,
    _store,
    sync_threads,
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _log2(v):
    """The hardware's logarithm: an error of 2**-22, where Triton's own has a polynomial and special cases."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [v], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _seen_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if RENAMED:
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def _softplus(v):
    """log(1 + exp(v)) = max(v, 0) + 2 atanh(e / (2 + e)) with e = exp(-|v|), by the series of atanh, to float32."""
    e = gl.exp2(-LOG2E * gl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 / 15
    for i in gl.static_range(7):
        p = p * q + 1.0 / (13 - 2 * i)
    return gl.maximum(v, 0.0) + 2.0 * s * p


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def prefetch(ptr):
    """Bring what is at these addresses into the L2 cache."""
    gl.inline_asm_elementwise(
        "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}", "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_bits(ptr):
    """What is at these addresses, a register each, without any wait: halves would be packed in pairs at once."""
    if ptr.dtype.element_ty == gl.float32:
        code: gl.constexpr = "ld.global.u32 $0, [$1];"
    else:
        code: gl.constexpr = "ld.global.u16 $0, [$1];"
    return gl.inline_asm_elementwise(code, "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _from_bits(bits, dtype: gl.constexpr):
    """As float32."""
    if dtype == gl.bfloat16:
        return (bits << 16).to(gl.float32, bitcast=True)
    elif dtype == gl.float16:
        code: gl.constexpr = "{.reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h;}"
        return gl.inline_asm_elementwise(code, "=r,r", [bits], dtype=gl.float32, is_pure=True, pack=1)
    else:
        return bits.to(gl.float32, bitcast=True)


@gluon.jit
def fence_inits(n):
    """Let the copy engine see what mbarriers have been initialised. Other fences wait for loads that are under way."""
    code: gl.constexpr = "{fence.mbarrier_init.release.cluster; mov.b32 $0, 0;}"
    gl.inline_asm_elementwise(code, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_chunk(
    x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, bar, stage, b, first, v, g, i, ahead, summed,
    N: gl.constexpr, PAIR: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Start copying what chunk i of both passes needs into a stage."""
    t = first + gl.where(i < summed, i - ahead, i - summed) * Q
    walking = i >= summed
    mbarrier.expect(bar, (N + PAIR * Q) * Q * 2, pred=i < summed)
    mbarrier.expect(bar, (2 * N + (2 if GATED else 1) * PAIR * Q) * Q * 2, pred=walking)
    _load(B_desc, [b, t, g * N], bar, Bs.index(stage))
    _load(C_desc, [b, t, g * N], bar, Cs.index(stage), pred=walking)
    for k in gl.static_range(PAIR):
        slot = stage * PAIR + k
        _load(x_desc, [b, t, (v + k) * Q], bar, xs.index(slot))
        if GATED:
            _load(z_desc, [b, t, (v + k) * Q], bar, zs.index(slot), pred=walking)


@gluon.jit
def load_role(
    begun, x_desc, B_desc, C_desc, z_desc, x_ptr, stride_x_t, tokens, second, xs, Bs, Cs, zs, full, walked, b, first, v,
    g, ahead, summed, chunks,
    N: gl.constexpr, PAIR: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    stage = 1  # the first chunk's has been started before there were roles
    phase = 0
    line = gl.arange(0, PAIR * Q, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    beside = line // Q * Q * second.to(gl.int32)
    mbarrier.wait(begun, 0)
    for i in range(1, summed + chunks):
        if i + EARLY < summed:  # B is in the L2 cache mostly, where another slice's block has asked for it
            t = gl.minimum((i + EARLY - ahead) * Q + line % Q, tokens - 1)
            prefetch(x_ptr + (t.to(gl.int64) * stride_x_t + beside))
        mbarrier.wait(walked.index(stage), phase ^ 1)
        load_chunk(x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full.index(stage), stage, b, first, v, g, i, ahead,
                   summed, N, PAIR, GATED)  # fmt: skip
        stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _of_group(dt_ptr, i, first_pass, ahead, q, tokens, stride_dt_t):
    """Where dt of the i-th four chunks is, of both passes; past the end, the last token's."""
    t = gl.where(i < first_pass, i * GROUP - ahead, (i - first_pass) * GROUP) * Q + q
    return dt_ptr + gl.minimum(t, tokens - 1).to(gl.int64) * stride_dt_t


@gluon.jit
def decays_role(
    k: gl.constexpr,
    dt_ptr,  # at [b, first token of the segment, head]
    A_ptr,
    bias_ptr,
    head,
    nums,
    known,
    unknown,
    stride_dt_t,
    dt_min,
    dt_max,
    tokens,  # left from the segment's first token on
    ahead,  # chunks of the first pass that lie before the segment
    summed,  # chunks of the first pass
    chunks,
    SOFTPLUS: gl.constexpr,
    CLAMP: gl.constexpr,
    PAIR: gl.constexpr,
    SPLIT: gl.constexpr,
    LOG_A: gl.constexpr,
    HEADS: gl.constexpr,
    dtype: gl.constexpr,  # of x
    begun,
    dts,  # of the first four chunks, from the scores' warps; not where two slices walk a whole sequence
    asked,
):
    # Two warps with one head between them take turns at the groups of chunks, and at the buffers.
    STEP: gl.constexpr = 2 if PAIR == 2 and HEADS == 1 else 1
    FIRST: gl.constexpr = k if STEP == 2 else 0
    slot: gl.constexpr = 0 if STEP == 2 else k
    # Where a block has warps to spare, four share the work, and the first chunk waits less.
    if gl.num_warps() == 1:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _seen_as(nums, dtype, [4 * HEADS * ROWS, GROUP, Q], rows)
    nums = _seen_as(nums, gl.float32, [2 * HEADS * ROWS, GROUP, Q], rows)
    chunk = gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    q = chunk[:, None] * Q + gl.arange(0, Q, gl.SliceLayout(0, layout))[None, :]  # [GROUP, Q]
    first_pass = (summed + GROUP - 1) // GROUP
    # all loads before the first use of one
    first = _of_group(dt_ptr, FIRST, first_pass, ahead, q, tokens, stride_dt_t)
    EARLY_DT: gl.constexpr = SPLIT or PAIR == 1
    if not EARLY_DT:
        coming = gl.load(first)
    elif FIRST > 0:
        coming = load_bits(first)
    A = gl.load(A_ptr + head)
    bias = 0.0
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + head).to(gl.float32)
    A = A.to(gl.float32)
    if LOG_A:
        A = -gl.exp(A)
    A *= LOG2E
    mbarrier.wait(begun, 0)
    if EARLY_DT and FIRST == 0:
        mbarrier.wait(asked, 0)
        coming = _seen_as(dts, gl.int32, [HEADS, GROUP, Q], rows).index(k).load(layout)
    buffer = FIRST
    phase = 0
    for i in range(FIRST, first_pass + (chunks + GROUP - 1) // GROUP, STEP):
        t = gl.where(i < first_pass, i * GROUP - ahead, (i - first_pass) * GROUP) * Q + q
        if EARLY_DT:
            dt = _from_bits(coming, dt_ptr.dtype.element_ty) + bias
        else:
            dt = coming.to(gl.float32) + bias
            coming = gl.load(_of_group(dt_ptr, i + STEP, first_pass, ahead, q, tokens, stride_dt_t))
        if SOFTPLUS:
            dt = _softplus(dt)
        if CLAMP:
            dt = gl.minimum(gl.maximum(dt, dt_min), dt_max)
        dt = gl.where(t < tokens, dt, 0.0)  # past the end: no decay, no input
        cum = gl.associative_scan(dt * A, 1, _add)
        entry = cum - _log2(dt)
        last = gl.sum(dt * A, axis=1)
        if SPLIT:  # in the first pass the decays of later chunks of the four are part of the weights
            rest = last
            whole = last
            everywhere: gl.constexpr = gl.SliceLayout(
                1, gl.BlockedLayout([GROUP, 1], [1, 32], [1, gl.num_warps()], [1, 0])
            )
            lasts = gl.convert_layout(last, everywhere)
            each = gl.arange(0, GROUP, everywhere)
            for j in gl.static_range(GROUP):
                later = gl.sum(gl.where(each == j, lasts, 0.0), axis=0)
                there = i * GROUP + j < summed
                rest += gl.where((chunk < j) & there, later, 0.0)
                whole += gl.where((chunk != j) & there, later, 0.0)
            left = rest[:, None] - entry
            last = whole[:, None]
        else:
            last = last[:, None]
            left = last - entry
        mbarrier.wait(unknown.index(buffer), phase ^ 1)
        row = (slot * 2 + buffer) * ROWS
        nums.index(row + _CUM).store(cum)
        nums.index(row + _ENTRY).store(entry)
        nums.index(row + _SINCE).store(gl.exp2(cum))
        value, rest = _split(gl.exp2(left), dtype)
        halves.index(2 * (row + _LEFT)).store(value)
        halves.index(2 * (row + _LEFT) + 1).store(rest)
        nums.index(row + _TOTAL).store(cum * 0.0 + gl.exp2(last))
        mbarrier.arrive(known.index(buffer), count=1)
        if EARLY_DT:  # earlier, it would take registers of which there are none left, or hold up the first four chunks
            coming = load_bits(_of_group(dt_ptr, i + STEP, first_pass, ahead, q, tokens, stride_dt_t))
            if PAIR == 2:  # worth 3% with two slices; with one, 4% and 5% are gained without
                prefetch(_of_group(dt_ptr, i + 2 * STEP, first_pass, ahead, q, tokens, stride_dt_t))
        if STEP == 2:
            phase ^= 1
        else:
            buffer, phase = _advance(buffer, phase, 2)


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
def _products(Bs, Cs, stage, N: gl.constexpr, mma: gl.constexpr):
    """Start C B^T of a chunk, [t, s]."""
    C = Cs.index(stage).reshape([Q, N])
    B = Bs.index(stage).reshape([Q, N])
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
    Bs,
    Cs,
    nums,
    G0,
    G1,
    own0,
    own1,
    D_ptr,
    D0,
    D1,
    full,
    known,
    unknown,
    scored,
    walked,
    walking,
    summed,
    chunks,
    PAIR: gl.constexpr,
    RELAXED: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
):
    dtype: gl.constexpr = Bs.dtype
    N: gl.constexpr = Bs.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    # The other roles' first instructions and numbers are on their way meanwhile.
    mbarrier.init(walking, count=PAIR)
    for i in gl.static_range(STAGES if STAGES > 2 else 2):  # one of a kind at a time: Triton puts a barrier between two
        if i < STAGES:
            if i > 0:
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
    stage = summed % STAGES
    phase = summed // STAGES & 1
    before = stage  # where the chunk before the last was
    passed = phase
    groups = (summed + GROUP - 1) // GROUP
    group = groups & 1
    unneeded = group
    turn = groups // 2 & 1
    buffer = 0
    for c in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        products = _products(Bs, Cs, stage, N, mma)
        mbarrier.wait(known.index(group), turn)
        mbarrier.wait(walked.index(before), passed, pred=c >= 2)  # G's place is free
        if c >= 2:
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


@gluon.jit
def _fetch(k: gl.constexpr, xs, full, stage, phase, there, PAIR: gl.constexpr, layout: gl.constexpr):
    """x^T [P, Q] of a chunk in registers; anything, where `there` says that it is not there."""
    mbarrier.wait(full.index(stage), phase, pred=there)
    return xs.index(stage * PAIR + k).reshape([Q, Q]).permute([1, 0]).load(layout)


@gluon.jit
def _weigh(k: gl.constexpr, xT, nums, group, c):
    """x^T times its weights."""
    left, rest = _weights(nums, k, group, c, xT.dtype, gl.SliceLayout(0, xT.type.layout))
    return _sum_of_products(xT, left[None, :], _product(xT, rest[None, :]))


@gluon.jit
def store_role(
    begun, y_desc, ys, walked, unready, walking, b, first, v, second, summed, chunks,
    PAIR: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.wait(begun, 0)
    if SPLIT:
        mbarrier.wait(walking, 0)
    place = 0
    stage = summed % STAGES
    phase = summed // STAGES & 1
    for c in range(chunks):
        mbarrier.wait(walked.index(stage), phase)
        stage, phase = _advance(stage, phase, STAGES)
        fence_async_shared()  # the copy engine reads what the walkers wrote, who need not wait for this fence
        for k in gl.static_range(PAIR):
            if k == 0:
                _store(y_desc, [b, first + c * Q, v * Q], ys.index(place))
            elif second:
                _store(y_desc, [b, first + c * Q, (v + 1) * Q], ys.index(place))
            place ^= 1
        tma.store_wait(0)
        for k in gl.static_range(PAIR):
            mbarrier.arrive(unready.index(place ^ 1 if PAIR == 1 else k), count=1)


@gluon.jit
def _beside(head: gl.constexpr, xT, owns, D, nums, group, c, mma: gl.constexpr, PER_CHANNEL: gl.constexpr):
    """What y^T = S C^T is multiplied by, and what is added to it for the tokens' own sake."""
    since = _numbers(nums, head, group, c, _SINCE).load(gl.SliceLayout(0, mma))[None, :]
    own = owns.load(gl.SliceLayout(0, mma))[None, :]
    if PER_CHANNEL:
        own = own + D[:, None]
    return since, gl.convert_layout(_widen(xT), mma) * own


@gluon.jit
def walk_role(
    k: gl.constexpr,
    begun,
    D_ptr,
    D_at,
    init_ptr,
    final_ptr,
    handed_ptr,
    passed_ptr,
    flag_ptr,
    xs,
    Bs,
    Cs,
    zs,
    nums,
    G,
    owns,
    ys,
    full,
    known,
    unknown,
    scored,
    walked,
    unready,
    walking,
    there,  # whether the slice is there: a group of an odd number of slices leaves one over
    state_row,
    handed_row,
    parts,  # of all blocks
    stride_D_p,
    seg,
    segments,
    ahead,
    summed,
    chunks,
    N: gl.constexpr,
    PAIR: gl.constexpr,
    GATED: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    Y_SCALE: gl.constexpr,
    HEADS: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
):
    head: gl.constexpr = k if HEADS == 2 else 0
    dtype: gl.constexpr = Bs.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    narrow_state: gl.constexpr = gl.DotOperandLayout(0, wide, 2)

    mbarrier.wait(begun, 0)
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
        xT = _fetch(k, xs, full, stage, phase, summed > 0, PAIR, narrow)
        mbarrier.wait(known.index(group), turn, pred=summed > 0)
        left, rest = _weights(nums, head, group, 0, dtype, gl.SliceLayout(0, narrow))
        part = _product(xT, rest[None, :])
        total = _numbers(nums, head, group, 0, _TOTAL).load(gl.SliceLayout(1, wide))
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
                # While the product runs, all but the last: what ptxas sees written while one runs, it waits for.
                xT = _fetch(k, xs, full, stage, phase, c + 1 < summed, PAIR, narrow)
                mbarrier.wait(known.index(group), turn, pred=c + 1 < summed)
                left, rest = _weights(nums, head, group, c + 1, dtype, gl.SliceLayout(0, narrow))
                part = _product(xT, rest[None, :])
                total = _numbers(nums, head, group, c + 1, _TOTAL).load(gl.SliceLayout(1, wide))
                state = warpgroup_mma_wait(0, [sum])
                mbarrier.arrive(walked.index(used), count=1)
                if last:
                    mbarrier.arrive(unknown.index(unneeded), count=1)
            if half == 0:
                before_segment = decay
                if there & (ahead > 0):  # what of the segment's first state this block itself has summed up
                    gl.store(_places(kept, N, wide), state.to(element))
        mbarrier.arrive(walking, count=1)
        if there:
            state = _hand_over(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg,
                               segments, N, kept, before_segment, ahead)  # fmt: skip
    elif init_ptr is not None:
        if there:
            state = gl.load(init_ptr + state_row + at).to(gl.float32)

    D = 0.0
    if PER_CHANNEL:
        rows = gl.arange(0, Q, gl.SliceLayout(1, mma))
        D = gl.load(D_ptr + D_at + rows * stride_D_p).to(gl.float32)
    buffer = 0
    lap = 0
    place = k
    stored = 0
    pairs = _packed(_fetch(k, xs, full, stage, phase, True, PAIR, narrow))
    mbarrier.wait(known.index(group), turn)
    for c in range(chunks):
        # With nothing, which ptxas does not know: it would see x written that a product under way is to read next.
        xT = _unpacked(pairs ^ (stage >> 16), dtype, narrow)
        # Here, not while the last chunk's product runs: ptxas would serialise the products.
        weighted = _weigh(head, xT, nums, group, c)
        total = _numbers(nums, head, group, c, _TOTAL).load(gl.SliceLayout(1, wide))
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        before = gl.convert_layout(state.to(dtype), narrow_state)
        state *= total[:, None]
        C = Cs.index(stage).reshape([Q, N])
        # The state needs nothing of y: both products are under way before either is waited for.
        y = warpgroup_mma(before, C.permute([1, 0]), zeros, use_acc=False, is_async=True)
        sum = warpgroup_mma(weighted, Bs.index(stage).reshape([Q, N]), state, is_async=True)
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
        pairs = _packed(_fetch(k, xs, full, stage, phase, c + 1 < chunks, PAIR, narrow))
        mbarrier.wait(known.index(group), turn, pred=c + 1 < chunks)
        y = warpgroup_mma_wait(0, [y])
        if GATED:
            z = zs.index(used * PAIR + k).reshape([Q, Q]).permute([1, 0]).load(narrow)
            z = gl.convert_layout(z, mma).to(gl.float32)
            y *= z / (1.0 + gl.exp2(-LOG2E * z))
        mbarrier.wait(unready.index(place), stored ^ 1)
        ys.index(place).reshape([Q, Q]).permute([1, 0]).store((y * Y_SCALE).to(dtype))
        mbarrier.arrive(walked.index(used), count=1)
        if PAIR == 1:
            place, stored = _advance(place, stored, 2)
        else:
            stored ^= 1
        buffer, lap = _advance(buffer, lap, 2)
    if STORE_FINAL:
        if there:
            if seg + 1 == segments:
                gl.store(gl.max_contiguous(gl.multiple_of(final_ptr + state_row + at, [8, 8]), [1, 8]), state)
