"""What the copy engine does in the Hopper SSD for a state of 256: the loader's and the store's roles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastmamba.kernels._ssd_hopper_terms import Q, _load, _store

N = gl.constexpr(256)
STAGES = gl.constexpr(2)  # of the second pass
DEEP = gl.constexpr(4)  # of the first, which needs no C and no G, and waits for memory


@gluon.jit
def _load_first(x_desc, B_desc, xs, Bs, bar, slot, b, t, v, g, there):
    """Start copying what a chunk of the first pass needs: a slot is a stage of B, or of C, and two places of xs."""
    mbarrier.expect(bar, (N + 2 * Q) * Q * 2, pred=there)
    for k in gl.static_range(2):
        _load(x_desc, [b, t, (v + k) * Q], bar, xs.index(2 * slot + k), pred=there)
    _load(B_desc, [b, t, g * N], bar, Bs.index(slot), pred=there)


@gluon.jit
def _load_C(C_desc, Cs, bar, stage, b, t, g):
    """Start copying C of a chunk of the second pass: the second half of the tiles."""
    mbarrier.expect(bar, N * Q * 2)
    for k in gl.static_range(4):
        _load(C_desc, [b, t, g * N + k * Q], bar, Cs.index(4 * (STAGES + stage) + k))


@gluon.jit
def _load_B(B_desc, Bs, bar, stage, b, t, g):
    mbarrier.expect(bar, N * Q * 2)
    _load(B_desc, [b, t, g * N], bar, Bs.index(stage))


@gluon.jit
def _load_slice(desc, places, bar, place, b, t, slice, there=True):
    """Start copying x or z of a walker's chunk."""
    mbarrier.expect(bar, Q * Q * 2, pred=there)
    _load(desc, [b, t, slice * Q], bar, places.index(place), pred=there)


@gluon.jit
def _await_last(summed_up, slot, count, there):
    """Wait until the walkers are through with the last of `count` chunks of the first pass in this slot."""
    last = count - 1 - (count - 1 - slot) % DEEP
    mbarrier.wait(summed_up.index(slot), last // DEEP & 1, pred=there & (slot < count))


@gluon.jit
def _load_role(
    x_desc, B_desc, C_desc, xs, Bs, Cs, came, summed_up, begun, read, full, walked, b, first, v, g, ahead, skip,
    summed, chunks, gap,
    SPLIT: gl.constexpr, DEALT: gl.constexpr,
):  # fmt: skip
    if SPLIT:  # the first chunk has been started before there were roles, or two
        for i in range(2 if DEALT else 1, summed - skip):
            slot = i % DEEP
            mbarrier.wait(summed_up.index(slot), (i // DEEP & 1) ^ 1)
            c = i + skip
            t = first + (c - ahead + gl.where(c < ahead, 0, gap)) * Q
            _load_first(x_desc, B_desc, xs, Bs, came.index(slot), slot, b, t, v, g, True)
    for c in range(0 if SPLIT else 1, chunks):
        stage = c % STAGES
        free = (c // STAGES & 1) ^ 1
        t = first + c * Q
        mbarrier.wait(read.index(stage), free)
        if SPLIT:  # C was B of the first pass, and x is where it was
            _await_last(summed_up, STAGES + stage, summed - skip, c < STAGES)
        _load_C(C_desc, Cs, begun.index(stage), stage, b, t, g)
        if SPLIT:
            _await_last(summed_up, stage, summed - skip, c < STAGES)
        for k in gl.static_range(2):
            mbarrier.wait(walked.index(2 * stage + k), free)
            _load_slice(x_desc, xs, full.index(stage), 2 * stage + k, b, t, v + k, c < STAGES)
        _load_B(B_desc, Bs, full.index(stage), stage, b, t, g)


@gluon.jit
def _store_role(
    y_desc, x_desc, z_desc, xs, zs, full, walked, gated, b, first, v, second, chunks,
    GATED: gl.constexpr,
):  # fmt: skip
    if GATED:
        for k in gl.static_range(2):
            _load_slice(z_desc, zs, gated.index(k), k, b, first, v + k)
    for c in range(chunks):
        stage = c % STAGES
        t = first + c * Q
        for k in gl.static_range(2):
            mbarrier.wait(walked.index(2 * stage + k), c // STAGES & 1)
            if GATED:
                _load_slice(z_desc, zs, gated.index(k), k, b, t + Q, v + k, c + 1 < chunks)
            fence_async_shared()  # the copy engine reads what the walkers wrote, who need not wait for this fence
            if k == 0:
                _store(y_desc, [b, t, v * Q], xs.index(2 * stage))
            elif second != 0:
                _store(y_desc, [b, t, (v + 1) * Q], xs.index(2 * stage + 1))
            tma.store_wait(0)
            _load_slice(x_desc, xs, full.index(stage), 2 * stage + k, b, t + STAGES * Q, v + k, c + STAGES < chunks)


@gluon.jit
def _load_pair(B_desc, C_desc, Bs, Cs, bar, stage, b, c, end, total):
    """Start copying B and C of a chunk whose scores are wanted, if it is before `end`: of group c // total."""
    there = c < end
    g = c // total
    t = (c - g * total) * Q
    mbarrier.expect(bar, 2 * N * Q * 2, pred=there)
    _load(B_desc, [b, t, g * N], bar, Bs.index(stage), pred=there)
    for k in gl.static_range(4):
        _load(C_desc, [b, t, g * N + k * Q], bar, Cs.index(4 * (STAGES + stage) + k), pred=there)
