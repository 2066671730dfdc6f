"""The SSD prefill on Hopper: one launch, each block a pipeline of specialised warps.

A block owns two heads (more exactly: two slices of 64 channels) of one group over one segment of the sequence, and
walks it in chunks of 64 tokens. Its warps have roles, tied together by a ring of shared-memory stages:

    loader    1 warp   copies x, B, C and z of a chunk into a stage (TMA: nothing is read past the end of the sequence)
    decays    1 + 1    turn dt of a slice into the running decays that everybody else needs, four chunks at a time
    scores    4 warps  G = (C B^T) * decay, once for the pair, into shared memory
    walkers   4 + 4    one slice each, the state in registers:
                       y^T = S C^T, then y^T += x^T G^T, then S = S * decay + (x w)^T B

Everything is transposed (channels are the rows) so that the state and x are register operands of the products and
never go through shared memory. Where batch x heads does not fill the GPU, the sequence is split into segments, and
the walkers first sum up what their segment adds to the state, hand it on, and then walk it again for the output, as in
`fastmamba.kernels.ssd`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastmamba.configs import SsdConfig
from fastmamba.kernels import _softplus
from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._sync import zeros_left_as_found

LOG2E = gl.constexpr(1.4426950408889634)
Q = gl.constexpr(64)  # tokens of a chunk; also the channels of a slice

_RENAMED = gl.constexpr(hasattr(gl, "barrier"))  # what Triton 3.6 still calls thread_barrier, and _reinterpret
_barrier = gl.barrier if _RENAMED.value else gl.thread_barrier
softplus = gluon.jit(_softplus.softplus.fn)

# What the decays warp leaves for each slice of a chunk: rows of 64 float32.
_CUM = gl.constexpr(0)  # log2 of the decay since the chunk began, at token t
_ENTRY = gl.constexpr(1)  # the same at token s, less log2 of dt: 2 ** (CUM[t] - ENTRY[s]) is what s contributes at t
_SINCE = gl.constexpr(2)  # decay since the chunk began
_LEFT = gl.constexpr(3)  # dt times the decay until the chunk ends
_TOTAL = gl.constexpr(4)  # decay over the chunk, the same in every column
_ROWS = gl.constexpr(5)
_GROUP = gl.constexpr(4)  # chunks that the decays warps work out at a time


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _spin(flag_ptr):
    """Wait until a flag is raised; what its writer wrote before is visible afterwards."""
    raised = 0
    while raised == 0:
        raised = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [flag_ptr], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _load_role(
    x_desc,
    B_desc,
    C_desc,
    z_desc,
    xs,
    Bs,
    Cs,
    zs,
    full,
    empty,
    b,
    first,
    v,
    g,
    summed,
    chunks,
    N: gl.constexpr,
    PAIR: gl.constexpr,
    GATED: gl.constexpr,
    STAGES: gl.constexpr,
):
    stage = 0
    phase = 0
    for i in range(summed + chunks):
        t = first + gl.where(i < summed, i, i - summed) * Q
        walking = i >= summed
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(bar, (N + PAIR * Q) * Q * 2, pred=i < summed)
        mbarrier.expect(bar, (2 * N + (2 if GATED else 1) * PAIR * Q) * Q * 2, pred=walking)
        tma.async_copy_global_to_shared(B_desc, [b, t, g * N], bar, Bs.index(stage))
        tma.async_copy_global_to_shared(C_desc, [b, t, g * N], bar, Cs.index(stage), pred=walking)
        for k in gl.static_range(PAIR):
            slot = stage * PAIR + k
            tma.async_copy_global_to_shared(x_desc, [b, t, (v + k) * Q], bar, xs.index(slot))
            if GATED:
                tma.async_copy_global_to_shared(z_desc, [b, t, (v + k) * Q], bar, zs.index(slot), pred=walking)
        stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _decays_role(
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
    summed,
    chunks,
    SOFTPLUS: gl.constexpr,
    CLAMP: gl.constexpr,
    PAIR: gl.constexpr,
    LOG_A: gl.constexpr,
):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if _RENAMED:
        nums = nums.reinterpret(gl.float32, [2 * PAIR * _ROWS, _GROUP, Q], rows)
    else:
        nums = nums._reinterpret(gl.float32, [2 * PAIR * _ROWS, _GROUP, Q], rows)
    chunk = gl.arange(0, _GROUP, gl.SliceLayout(1, layout))
    q = chunk[:, None] * Q + gl.arange(0, Q, gl.SliceLayout(0, layout))[None, :]  # [GROUP, Q]
    A = gl.load(A_ptr + head).to(gl.float32)
    if LOG_A:
        A = -gl.exp(A)
    A *= LOG2E
    bias = 0.0
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + head).to(gl.float32)
    ahead = gl.load(dt_ptr + q.to(gl.int64) * stride_dt_t, mask=q < tokens, other=0.0)
    buffer = 0
    phase = 0
    first_pass = (summed + _GROUP - 1) // _GROUP
    for i in range(first_pass + (chunks + _GROUP - 1) // _GROUP):
        t = gl.where(i < first_pass, i, i - first_pass) * (_GROUP * Q) + q
        dt = ahead.to(gl.float32) + bias
        after = gl.where(i + 1 < first_pass, i + 1, i + 1 - first_pass) * (_GROUP * Q) + q
        ahead = gl.load(dt_ptr + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
        if SOFTPLUS:
            dt = softplus(dt)
        if CLAMP:
            dt = gl.minimum(gl.maximum(dt, dt_min), dt_max)
        dt = gl.where(t < tokens, dt, 0.0)  # past the end: no decay, no input
        cum = gl.associative_scan(dt * A, 1, _add)
        entry = cum - gl.log2(dt)
        last = gl.sum(dt * A, axis=1)[:, None]
        mbarrier.wait(unknown.index(k * 2 + buffer), phase ^ 1)
        row = (k * 2 + buffer) * _ROWS
        nums.index(row + _CUM).store(cum)
        nums.index(row + _ENTRY).store(entry)
        nums.index(row + _SINCE).store(gl.exp2(cum))
        nums.index(row + _LEFT).store(gl.exp2(last - entry))
        nums.index(row + _TOTAL).store(gl.exp2(cum * 0.0 + last))
        mbarrier.arrive(known.index(k * 2 + buffer), count=1)
        buffer, phase = _advance(buffer, phase, 2)


@gluon.jit
def _numbers(nums, k: gl.constexpr, buffer, c, ROW: gl.constexpr):
    """A row of slice k in chunk c of a pass."""
    return nums.index(((k * 2 + buffer) * _ROWS + ROW) * _GROUP + c % _GROUP)


@gluon.jit
def _products(Bs, Cs, stage, N: gl.constexpr, mma: gl.constexpr):
    """Start C B^T of a chunk, [t, s]."""
    C = Cs.index(stage).reshape([Q, N])
    B = Bs.index(stage).reshape([Q, N])
    return warpgroup_mma(C, B.permute([1, 0]), gl.zeros((Q, Q), gl.float32, mma), use_acc=False, is_async=True)


@gluon.jit
def _scores_role(
    Bs,
    Cs,
    nums,
    G0,
    G1,
    full,
    empty,
    known,
    unknown,
    scored,
    unscored,
    summed,
    chunks,
    PAIR: gl.constexpr,
    RELAXED: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = Bs.dtype
    N: gl.constexpr = Bs.shape[3]
    WARPS: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, 256 // WARPS, 16])
    t = gl.arange(0, Q, gl.SliceLayout(1, mma))
    s = gl.arange(0, Q, gl.SliceLayout(0, mma))
    causal = t[:, None] >= s[None, :]
    stage = 0
    phase = 0
    group = 0
    turn = 0
    for c in range(summed):  # nothing to do but to keep in step
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)
        if (c % _GROUP == _GROUP - 1) | (c + 1 == summed):
            for k in gl.static_range(PAIR):
                mbarrier.wait(known.index(k * 2 + group), turn)
                mbarrier.arrive(unknown.index(k * 2 + group), count=1)
            group, turn = _advance(group, turn, 2)
    buffer = 0
    lap = 0
    for c in range(chunks):
        mbarrier.wait(full.index(stage), phase)
        products = _products(Bs, Cs, stage, N, mma)
        for k in gl.static_range(PAIR):
            mbarrier.wait(known.index(k * 2 + group), turn)
        scores = gl.where(causal, warpgroup_mma_wait(0, [products]), 0.0)  # [t, s]
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, STAGES)
        mbarrier.wait(unscored.index(buffer), lap ^ 1)
        for k in gl.static_range(PAIR):
            cum = _numbers(nums, k, group, c, _CUM).load(gl.SliceLayout(1, mma))
            entry = _numbers(nums, k, group, c, _ENTRY).load(gl.SliceLayout(0, mma))
            # finite above the diagonal, where the scores are zero
            decay = gl.exp2(gl.minimum(cum[:, None] - entry[None, :], 15.0 if RELAXED else 126.0))
            if RELAXED:
                G = scores.to(dtype) * decay.to(dtype)
            else:
                G = (scores * decay).to(dtype)
            if k == 0:
                G0.index(buffer).store(G)
            else:
                G1.index(buffer).store(G)
        fence_async_shared()
        mbarrier.arrive(scored.index(buffer), count=1)
        buffer, lap = _advance(buffer, lap, 2)
        if (c % _GROUP == _GROUP - 1) | (c + 1 == chunks):
            for k in gl.static_range(PAIR):
                mbarrier.arrive(unknown.index(k * 2 + group), count=1)
            group, turn = _advance(group, turn, 2)


@gluon.jit
def _fetch(k: gl.constexpr, xs, full, stage, phase, there, PAIR: gl.constexpr, layout: gl.constexpr):
    """x^T [P, Q] of a chunk in registers; anything, where `there` says that it is not there."""
    mbarrier.wait(full.index(stage), phase, pred=there)
    return xs.index(stage * PAIR + k).reshape([Q, Q]).permute([1, 0]).load(layout)


@gluon.jit
def _weigh(k: gl.constexpr, xT, nums, group, c, wide: gl.constexpr):
    """x^T times its weights in the state after the chunk, and the chunk's decay [P]."""
    left = _numbers(nums, k, group, c, _LEFT).load(gl.SliceLayout(0, xT.type.layout))
    total = _numbers(nums, k, group, c, _TOTAL).load(gl.SliceLayout(1, wide))
    return (xT.to(gl.float32) * left[None, :]).to(xT.dtype), total


@gluon.jit
def _walk_role(
    k: gl.constexpr,
    y_desc,
    D_ptr,
    D_at,
    init_ptr,
    final_ptr,
    handed_ptr,
    flag_ptr,
    xs,
    Bs,
    Cs,
    zs,
    nums,
    G,
    ys,
    full,
    empty,
    known,
    unknown,
    scored,
    unscored,
    b,
    first,
    v,
    own,  # whether the slice is there: a group of an odd number of slices leaves one over
    state_row,
    handed_row,
    stride_D_p,
    seg,
    segments,
    summed,
    chunks,
    N: gl.constexpr,
    PAIR: gl.constexpr,
    GATED: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = Bs.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    narrow_state: gl.constexpr = gl.DotOperandLayout(0, wide, 2)

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
        xT = _fetch(k, xs, full, stage, phase, summed > 0, PAIR, narrow)
        for c in range(summed):  # what this segment alone adds to the state
            mbarrier.wait(known.index(k * 2 + group), turn)
            weighted, total = _weigh(k, xT, nums, group, c, wide)
            decay *= total
            B = Bs.index(stage).reshape([Q, N])
            sum = warpgroup_mma(weighted, B, state * total[:, None], is_async=True)
            if (c % _GROUP == _GROUP - 1) | (c + 1 == summed):
                mbarrier.arrive(unknown.index(k * 2 + group), count=1)
                group, turn = _advance(group, turn, 2)
            used = stage
            stage, phase = _advance(stage, phase, STAGES)
            xT = _fetch(k, xs, full, stage, phase, c + 1 < summed, PAIR, narrow)  # while the product runs
            state = warpgroup_mma_wait(0, [sum])
            mbarrier.arrive(empty.index(used), count=1)
        if own:
            before = gl.zeros((Q, N), gl.float32, wide)
            handed = handed_ptr + handed_row
            if seg > 0:
                _spin(flag_ptr - 1)
                _barrier()
                gl.store(flag_ptr - 1, 0)  # the flags are left as they were found
                # written by another multiprocessor a moment ago: not from the L1 cache
                before = gl.load(handed - Q * N + at, cache_modifier=".cg").to(gl.float32)
            elif init_ptr is not None:
                before = gl.load(init_ptr + state_row + at).to(gl.float32)
            if seg + 1 < segments:
                gl.store(handed + at, (state + before * decay[:, None]).to(handed_ptr.dtype.element_ty))
                _barrier()  # every thread's part is written before the flag rises
                gl.atomic_xchg(flag_ptr, 1, sem="release")
            state = before
    elif init_ptr is not None:
        if own:
            state = gl.load(init_ptr + state_row + at).to(gl.float32)

    if D_ptr is not None:
        rows = gl.arange(0, Q, gl.SliceLayout(1, mma))
        D = gl.load(D_ptr + D_at + rows * stride_D_p).to(gl.float32)
    buffer = 0
    lap = 0
    xT = _fetch(k, xs, full, stage, phase, True, PAIR, narrow)
    for c in range(chunks):
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        before = gl.convert_layout(state.to(dtype), narrow_state)
        C = Cs.index(stage).reshape([Q, N])
        y = warpgroup_mma(before, C.permute([1, 0]), zeros, use_acc=False, is_async=True)
        # in the shadow of that product: what the other one takes
        mbarrier.wait(known.index(k * 2 + group), turn)
        weighted, total = _weigh(k, xT, nums, group, c, wide)
        decayed = state * total[:, None]
        y = warpgroup_mma_wait(0, [y])
        y *= _numbers(nums, k, group, c, _SINCE).load(gl.SliceLayout(0, mma))[None, :]
        mbarrier.wait(scored.index(buffer), lap)
        y = warpgroup_mma(xT, G.index(buffer).permute([1, 0]), y, is_async=True)
        sum = warpgroup_mma(weighted, Bs.index(stage).reshape([Q, N]), decayed, is_async=True)
        y = warpgroup_mma_wait(1, [y])
        tma.store_wait(0)  # of the chunk before
        mbarrier.arrive(unscored.index(buffer), count=1)
        if D_ptr is not None:
            y += gl.convert_layout(xT, mma).to(gl.float32) * D[:, None]
        if GATED:
            z = zs.index(stage * PAIR + k).reshape([Q, Q]).permute([1, 0]).load(narrow)
            z = gl.convert_layout(z, mma).to(gl.float32)
            y *= z / (1.0 + gl.exp2(-LOG2E * z))
        staged = ys.index(k)
        staged.reshape([Q, Q]).permute([1, 0]).store(y.to(dtype))
        fence_async_shared()
        _barrier()
        if own:
            tma.async_copy_shared_to_global(y_desc, [b, first + c * Q, v * Q], staged)
        if (c % _GROUP == _GROUP - 1) | (c + 1 == chunks):
            mbarrier.arrive(unknown.index(k * 2 + group), count=1)
            group, turn = _advance(group, turn, 2)
        buffer, lap = _advance(buffer, lap, 2)
        used = stage
        stage, phase = _advance(stage, phase, STAGES)
        # the next chunk's, while the product with the state runs
        xT = _fetch(k, xs, full, stage, phase, c + 1 < chunks, PAIR, narrow)
        state = warpgroup_mma_wait(0, [sum])
        mbarrier.arrive(empty.index(used), count=1)
    tma.store_wait(0)
    if STORE_FINAL:
        if own:
            if seg + 1 == segments:
                gl.store(final_ptr + state_row + at, state)


_SIZES = ["T", "slices", "slices_per_group", "blocks_per_group", "groups", "segments", "chunks_per_segment"]
_STRIDES = ["stride_dt_b", "stride_dt_t", "stride_dt_h", "stride_D_h", "stride_D_p"]


# One binary for all sizes: a specialisation saves nothing here and costs seconds of compilation.
@gluon.jit(do_not_specialize=_SIZES + _STRIDES)
def _kernel(
    dt_ptr,
    x_desc,
    B_desc,
    C_desc,
    z_desc,
    y_desc,
    A_ptr,
    D_ptr,
    bias_ptr,
    init_ptr,
    final_ptr,
    handed_ptr,
    sync_ptr,
    T,
    slices,  # of 64 channels, in all heads
    slices_per_group,
    blocks_per_group,
    groups,
    segments,
    chunks_per_segment,
    dt_min,
    dt_max,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_D_h,
    stride_D_p,
    N: gl.constexpr,
    SLICES: gl.constexpr,  # of one head
    PAIR: gl.constexpr,  # slices that a block walks, 1 or 2
    SOFTPLUS: gl.constexpr,
    CLAMP: gl.constexpr,
    GATED: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    SPLIT: gl.constexpr,
    RELAXED: gl.constexpr,
    STAGES: gl.constexpr,
    LOG_A: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
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
    place = ticket % blocks_per_group * PAIR
    v = g * slices_per_group + place
    second = place + 1 < slices_per_group

    first_chunk = seg * chunks_per_segment
    first = first_chunk * Q
    total = (T + Q - 1) // Q
    last = seg + 1 == segments
    chunks = gl.where(last, total - first_chunk, chunks_per_segment)  # the last one takes what is left
    summed = gl.where(last, 0, chunks)
    tokens = T - first
    head0 = v // SLICES
    v1 = gl.where(second, v + 1, v)
    head1 = v1 // SLICES

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    xs = gl.allocate_shared_memory(dtype, [STAGES * PAIR, 1, Q, Q], tile)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], tile)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, 1, Q, N], tile)
    zs = xs
    if GATED:
        zs = gl.allocate_shared_memory(dtype, [STAGES * PAIR, 1, Q, Q], tile)
    # Two memories: Triton would put a barrier between stores to parts of one.
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    G0 = gl.allocate_shared_memory(dtype, [2, Q, Q], square)
    G1 = G0
    if PAIR == 2:
        G1 = gl.allocate_shared_memory(dtype, [2, Q, Q], square)
    ys = gl.allocate_shared_memory(dtype, [PAIR, 1, Q, Q], tile)
    nums = gl.allocate_shared_memory(gl.float32, [2 * PAIR * _ROWS * _GROUP, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # of slice k's buffer i at 2k + i
    known = gl.allocate_shared_memory(gl.int64, [2 * PAIR, 1], mbarrier.MBarrierLayout())
    unknown = gl.allocate_shared_memory(gl.int64, [2 * PAIR, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    unscored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 + PAIR)  # the scores and the walkers
    for i in gl.static_range(2 * PAIR):
        mbarrier.init(known.index(i), count=1)
        mbarrier.init(unknown.index(i), count=2)  # the scores and a walker
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=1)
        mbarrier.init(unscored.index(i), count=PAIR)  # the walkers
    fence_async_shared()
    _barrier()

    channels = slices * Q
    state_row = (b.to(gl.int64) * channels + v * Q) * N
    state_row1 = (b.to(gl.int64) * channels + v1 * Q) * N
    handed_row = ((b.to(gl.int64) * slices + v) * segments + seg) * (Q * N)
    handed_row1 = ((b.to(gl.int64) * slices + v1) * segments + seg) * (Q * N)
    flag = sync_ptr + 1 + (b * slices + v) * segments + seg
    flag1 = sync_ptr + 1 + (b * slices + v1) * segments + seg
    D0 = head0 * stride_D_h + v % SLICES * Q * stride_D_p
    D1 = head1 * stride_D_h + v1 % SLICES * Q * stride_D_p
    dt_at = dt_ptr + b.to(gl.int64) * stride_dt_b + first.to(gl.int64) * stride_dt_t
    dt0 = dt_at + head0 * stride_dt_h
    dt1 = dt_at + head1 * stride_dt_h

    # fmt: off
    if PAIR == 2:
        gl.warp_specialize(
            [
                (_scores_role, (Bs, Cs, nums, G0, G1, full, empty, known, unknown, scored, unscored, summed, chunks,
                                PAIR, RELAXED, STAGES)),
                (_walk_role, (gl.constexpr(0), y_desc, D_ptr, D0, init_ptr, final_ptr, handed_ptr, flag, xs, Bs, Cs, zs,
                              nums, G0, ys, full, empty, known, unknown, scored, unscored, b, first, v, v >= 0,
                              state_row, handed_row, stride_D_p, seg, segments, summed, chunks, N, PAIR, GATED,
                              STORE_FINAL, SPLIT, STAGES)),
                (_walk_role, (gl.constexpr(1), y_desc, D_ptr, D1, init_ptr, final_ptr, handed_ptr, flag1, xs, Bs, Cs,
                              zs, nums, G1, ys, full, empty, known, unknown, scored, unscored, b, first, v1, second,
                              state_row1, handed_row1, stride_D_p, seg, segments, summed, chunks, N, PAIR, GATED,
                              STORE_FINAL, SPLIT, STAGES)),
                (_load_role, (x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, empty, b, first, v, g, summed,
                              chunks, N, PAIR, GATED, STAGES)),
                (_decays_role, (gl.constexpr(0), dt0, A_ptr, bias_ptr, head0, nums, known, unknown, stride_dt_t, dt_min,
                                dt_max, tokens, summed, chunks, SOFTPLUS, CLAMP, PAIR, LOG_A)),
                (_decays_role, (gl.constexpr(1), dt1, A_ptr, bias_ptr, head1, nums, known, unknown, stride_dt_t, dt_min,
                                dt_max, tokens, summed, chunks, SOFTPLUS, CLAMP, PAIR, LOG_A)),
            ],
            [4, 4, 1, 1, 1],
            [192, 192, 40, 40, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_scores_role, (Bs, Cs, nums, G0, G1, full, empty, known, unknown, scored, unscored, summed, chunks,
                                PAIR, RELAXED, STAGES)),
                (_walk_role, (gl.constexpr(0), y_desc, D_ptr, D0, init_ptr, final_ptr, handed_ptr, flag, xs, Bs, Cs, zs,
                              nums, G0, ys, full, empty, known, unknown, scored, unscored, b, first, v, v >= 0,
                              state_row, handed_row, stride_D_p, seg, segments, summed, chunks, N, PAIR, GATED,
                              STORE_FINAL, SPLIT, STAGES)),
                (_load_role, (x_desc, B_desc, C_desc, z_desc, xs, Bs, Cs, zs, full, empty, b, first, v, g, summed,
                              chunks, N, PAIR, GATED, STAGES)),
                (_decays_role, (gl.constexpr(0), dt0, A_ptr, bias_ptr, head0, nums, known, unknown, stride_dt_t, dt_min,
                                dt_max, tokens, summed, chunks, SOFTPLUS, CLAMP, PAIR, LOG_A)),
            ],
            [4, 1, 1],
            [224, 64, 64],
        )
    # fmt: on


_launch = Launcher(_kernel)
_TILE = gl.NVMMASharedLayout(128, 16, rank=3)


def _descriptor(tensor: Tensor, channels: int, block: int) -> TensorDescriptor:
    """Of a tensor seen as (B, T, channels), in blocks of 64 tokens.

    The checks of TensorDescriptor's own constructor cost more than the rest of a launch; `fastmamba.kernels.ssd` has
    made them.
    """
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = tensor
    descriptor.shape = [tensor.shape[0], tensor.shape[1], channels]
    descriptor.strides = [tensor.stride(0), tensor.stride(1), 1]
    descriptor.block_shape = [1, 64, block]
    descriptor.layout = _TILE
    descriptor.padding = "zero"
    return descriptor


def ssd(
    config: SsdConfig,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    state_dtype: torch.dtype,
    relaxed: bool,
    log_A: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the Hopper kernel as `config` says; arguments as `fastmamba.kernels.ssd.ssd`, half precision, regular."""
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2], B.shape[3]
    slices = heads * head_dim // 64
    slices_per_group = slices // groups
    blocks_per_group = -(-slices_per_group // config.block_slices)
    chunks = -(-tokens // config.chunk)
    segments = min(config.segments, chunks)
    # Equal ones, though the last has no first pass: it has to wait until the others are through with theirs.
    per_segment = -(-chunks // segments)
    segments = -(-chunks // per_segment)

    new = x.new_empty
    y = new(x.shape)
    final = new((batch, heads, head_dim, width) if return_final_states else (1,), dtype=torch.float32)
    handed = sync = final  # not looked at unless the sequence is split
    if segments > 1:
        handed = new(batch * slices * segments * 64 * width, dtype=state_dtype)
        sync = zeros_left_as_found(1 + batch * slices * segments, x.device)
    channels = heads * head_dim
    tensors: tuple[Any, ...] = (
        dt,
        _descriptor(x, channels, 64),
        _descriptor(B, groups * width, width),
        _descriptor(C, groups * width, width),
        None if z is None else _descriptor(z, channels, 64),
        _descriptor(y, channels, 64),
        A.contiguous(),
        None if D is None else D.contiguous(),
        None if dt_bias is None else dt_bias.contiguous(),
        None if initial_states is None else initial_states.contiguous(),
        final,
        handed,
        sync,
    )
    numbers = (
        tokens,
        slices,
        slices_per_group,
        blocks_per_group,
        groups,
        segments,
        per_segment,
        dt_min,
        dt_max,
        *dt.stride(),
        *((0, 0) if D is None else (1, 0) if D.ndim == 1 else (head_dim, 1)),
    )
    clamp = dt_min > 0.0 or dt_max != float("inf") or not dt_softplus
    constants = (
        width,
        head_dim // 64,
        config.block_slices,
        dt_softplus,
        clamp,
        z is not None,
        return_final_states,
        segments > 1,
        relaxed,
        2 if z is not None and width > 64 else config.stages,
        log_A,
    )
    _launch((batch * groups * blocks_per_group * segments, 1, 1), tensors, numbers, constants, num_warps=config.warps)
    return y, final if return_final_states else new(0, dtype=torch.float32)
