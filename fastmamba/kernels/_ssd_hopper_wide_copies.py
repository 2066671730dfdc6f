"""What the copy engine does in the Hopper SSD for a state of 256: the loader's and the store's roles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fastmamba.kernels._ssd_hopper_terms import Q, _load, _store

N = gl.constexpr(256)
STAGES = gl.constexpr(2)  # of the second pass
DEEP = gl.constexpr(4)  # of the first, which needs no C and no G, and waits for memory
BITS = gl.constexpr(20)  # a part of blocks is given in 2**20ths, rounded up: quotients are exact for 1,000 blocks


@gluon.jit
def _pair_of(pair, blocks_per_group, slices_per_group, part_of_group):
    """Of a sequence's pair of slices: its group, its first slice, and whether there is a second one."""
    g = pair * part_of_group >> BITS
    place = (pair - g * blocks_per_group) * 2
    return g, g * slices_per_group + place, (place + 1 < slices_per_group).to(gl.int32)


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
def _load_after(desc, places, bar, place, b, first, c, chunks, slice, coming, more):
    """`_load_slice` of chunk c of a pair's `chunks`; from there on of the pair that comes, if one does."""
    here = c < chunks
    t = first + gl.where(here, c, c - chunks) * Q
    _load_slice(desc, places, bar, place, b, t, gl.where(here, slice, coming), here | more)


@gluon.jit
def _load_role(
    x_desc, B_desc, C_desc, xs, Bs, Cs, came, summed_up, begun, read, full, walked, walking, b, first, pair, pieces,
    blocks_per_group, slices_per_group, part_of_group, ahead, summed, chunks,
    SPLIT: gl.constexpr,
):  # fmt: skip
    if SPLIT:  # the first chunk has been started before there were roles
        g, v, _ = _pair_of(pair, blocks_per_group, slices_per_group, part_of_group)
        for i in range(1, summed):
            slot = i % DEEP
            mbarrier.wait(summed_up.index(slot), (i // DEEP & 1) ^ 1)
            _load_first(x_desc, B_desc, xs, Bs, came.index(slot), slot, b, first + (i - ahead) * Q, v, g, True)
        mbarrier.wait(walking, 0)
    for piece in range(pieces):
        g, v, _ = _pair_of(pair + piece, blocks_per_group, slices_per_group, part_of_group)
        unused = gl.where(piece == 0, STAGES, 0)  # later x comes by the store's role
        for c in range(0 if SPLIT else 1, chunks):
            stage = c % STAGES
            free = (c // STAGES & 1) ^ 1
            t = first + c * Q
            mbarrier.wait(read.index(stage), free)
            _load_C(C_desc, Cs, begun.index(stage), stage, b, t, g)
            for k in gl.static_range(2):
                mbarrier.wait(walked.index(2 * stage + k), free)
                _load_slice(x_desc, xs, full.index(stage), 2 * stage + k, b, t, v + k, c < unused)
            _load_B(B_desc, Bs, full.index(stage), stage, b, t, g)


@gluon.jit
def _store_role(
    y_desc, x_desc, z_desc, xs, zs, full, walked, gated, b, first, pair, pieces, blocks_per_group,
    slices_per_group, part_of_group, chunks,
    GATED: gl.constexpr,
):  # fmt: skip
    if GATED:
        _, v, _ = _pair_of(pair, blocks_per_group, slices_per_group, part_of_group)
        for k in gl.static_range(2):
            _load_slice(z_desc, zs, gated.index(k), k, b, first, v + k)
    for piece in range(pieces):
        _, v, second = _pair_of(pair + piece, blocks_per_group, slices_per_group, part_of_group)
        _, coming, _ = _pair_of(pair + piece + 1, blocks_per_group, slices_per_group, part_of_group)
        for c in range(chunks):
            stage = c % STAGES
            t = first + c * Q
            for k in gl.static_range(2):
                mbarrier.wait(walked.index(2 * stage + k), c // STAGES & 1)
                if GATED:
                    _load_after(z_desc, zs, gated.index(k), k, b, first, c + 1, chunks, v + k, coming + k,
                                piece + 1 < pieces)  # fmt: skip
                fence_async_shared()  # the copy engine reads what the walkers wrote, who need not wait for this fence
                if k == 0:
                    _store(y_desc, [b, t, v * Q], xs.index(2 * stage))
                elif second != 0:
                    _store(y_desc, [b, t, (v + 1) * Q], xs.index(2 * stage + 1))
                tma.store_wait(0)
                _load_after(x_desc, xs, full.index(stage), 2 * stage + k, b, first, c + STAGES, chunks, v + k,
                            coming + k, piece + 1 < pieces)  # fmt: skip


@gluon.jit
def _load_pair(B_desc, C_desc, Bs, Cs, bar, stage, b, t, there):
    """Start copying B and C of a chunk whose scores are wanted, of the only group."""
    mbarrier.expect(bar, 2 * N * Q * 2, pred=there)
    _load(B_desc, [b, t, 0], bar, Bs.index(stage), pred=there)
    for k in gl.static_range(4):
        _load(C_desc, [b, t, k * Q], bar, Cs.index(4 * (STAGES + stage) + k), pred=there)
