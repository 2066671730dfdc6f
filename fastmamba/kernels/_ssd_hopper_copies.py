"""Copies to and from shared memory in the Hopper SSD, and what is asked for ahead of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastmamba.kernels._ssd_hopper_terms import EARLY, Q, _advance, _load, _store


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
