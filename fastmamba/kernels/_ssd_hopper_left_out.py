"""What first passes of the Hopper SSD leave out: chunks that come to nothing until their part of the pass ends."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastmamba.kernels._dealt import NOTHING
from fastmamba.kernels._ssd_hopper_decays import _add

_NOTHING = gl.constexpr(NOTHING.value)  # log2 of a decay that leaves nothing
_STEP = gl.constexpr(256)  # chunks looked at at a time


@gluon.jit
def first_that_count(falls_ptr, row0, row1, begin, middle, end, needed):
    """Of [begin, middle) and [middle, end) the first chunks that count; where there are none, the ends.

    A chunk counts where the decay from its end to that of its part is not below 2**_NOTHING, of either of two heads.
    log2 of their decays over each chunk are from `falls_ptr` + `row0` and `row1` on. All count of a head that grows, or
    is not a number, or of a part of no more chunks than are `needed` by an estimate.
    """
    # A warp has one head's part: [4, _STEP], from the part's end backward.
    layout: gl.constexpr = gl.BlockedLayout([1, _STEP // 32], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, 4, gl.SliceLayout(1, layout))
    back = gl.arange(0, _STEP, gl.SliceLayout(0, layout))[None, :]
    heads = gl.where(row % 2 == 0, row0, row1)[:, None]
    begins = gl.where(row < 2, begin, middle)
    ends = gl.where(row < 2, middle, end)
    all_count = ends - begins <= needed
    firsts = gl.where(all_count, begins, ends)
    begins = gl.where(all_count, ends, begins)  # not looked at
    since = gl.zeros([4], gl.float32, gl.SliceLayout(1, layout))
    seen = 0
    more = gl.max(gl.where(all_count, 0, 1), axis=0)
    while more > 0:
        chunk = ends[:, None] - 1 - seen - back
        there = chunk >= begins[:, None]
        fall = gl.load(falls_ptr + (heads + chunk), mask=there, other=0.0)
        until = gl.associative_scan(fall, 1, _add) - fall + since[:, None]  # from the chunk's end on
        left_out = (until < _NOTHING) | (chunk < begins[:, None])
        firsts = gl.minimum(firsts, gl.min(gl.where(left_out, ends[:, None], chunk), axis=1))
        since += gl.sum(fall, axis=1)
        seen += _STEP
        over = (since < _NOTHING) | (ends - seen <= begins)
        more = gl.max(gl.where(over, 0, 1), axis=0)
    return gl.min(gl.where(row < 2, firsts, middle), axis=0), gl.min(gl.where(row < 2, end, firsts), axis=0)
