"""What all of the Hopper SSD counts in, and names that Triton's versions differ in."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from fastmamba import ssd_plan

LOG2E = gl.constexpr(1.4426950408889634)
Q = gl.constexpr(64)  # tokens of a chunk; also the channels of a slice

RENAMED = gl.constexpr(hasattr(gl, "barrier"))  # what Triton 3.6 still calls thread_barrier, and _reinterpret
sync_threads = gl.barrier if RENAMED.value else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# What a decays warp leaves for each head of a chunk: rows of 64 float32.
_CUM = gl.constexpr(0)  # log2 of the decay since the chunk began, at token t
_ENTRY = gl.constexpr(1)  # the same at token s, less log2 of dt: 2 ** (CUM[t] - ENTRY[s]) is what s contributes at t
_SINCE = gl.constexpr(2)  # decay since the chunk began
_LEFT = gl.constexpr(3)  # dt times the decay until the chunk ends, as two halves of the dtype of x: value and rest
_TOTAL = gl.constexpr(4)  # decay over the chunk, the same in every column
ROWS = gl.constexpr(5)
GROUP = gl.constexpr(ssd_plan.GROUP)
EARLY = gl.constexpr(3)  # how many chunks before it is loaded x is asked for, in the first pass
MOST_PIECES = gl.constexpr(ssd_plan.MOST_PIECES)
MOST_UNITS = gl.constexpr(ssd_plan.MOST_UNITS)
SPAN = gl.constexpr(ssd_plan.SPAN)


@gluon.jit
def _seen_as(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if RENAMED:
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def piece_of(block, listed, piece, DEALT: gl.constexpr):
    """Of a block's piece: the block of a segment whose slices it has, and the how manieth of a leader's pieces it is.

    Of those that follow each other in time: the state goes on from one to the next.
    """
    if DEALT:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        entry = gl.sum(listed.index(piece).load(layout), axis=0)
        return entry & 0xFFFF, entry >> 16
    else:
        return block + piece, 0


@gluon.jit
def slices_of(block, part_of_group, blocks_per_group, slices_per_group, PAIR: gl.constexpr):
    """Of a block of a segment: its group, its first slice of all, and 1 where its second one is there, else 0.

    A group of an odd number of slices leaves one over. No division of integers, which takes long.
    """
    g = ((block.to(gl.float32) + 0.5) * part_of_group).to(gl.int32)
    place = (block - g * blocks_per_group) * PAIR
    return g, g * slices_per_group + place, (place + 1 < slices_per_group).to(gl.int32)


@gluon.jit
def _wait_for_launches_before():
    """What they wrote is visible then: this kernel starts while they still run."""
    gl.inline_asm_elementwise("{griddepcontrol.wait; mov.b32 $0, 0;}", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
