"""C B^T in the Hopper SSD for a state of 256: blocks that work it out, and how those that walk wait for it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_terms import Q, sync_threads
from fastmamba.kernels._ssd_hopper_wide_copies import STAGES, N, _load_pair


@gluon.jit
def _fence_copies(n):
    """Between plain accesses to global memory and the copy engine's."""
    code: gl.constexpr = "{fence.proxy.async.global; mov.b32 $0, 0;}"
    gl.inline_asm_elementwise(code, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _score(
    B_desc, C_desc, scores_ptr, Bs, Cs, full, before, b, begin, end, step, total, groups,
):  # fmt: skip
    """C B^T of every `step`-th chunk from `begin` on, before `end`, of all groups, whose chunks follow each other.

    `before` are the chunks that went through the stages before; the number of them that have then is returned.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    t = gl.arange(0, Q, gl.SliceLayout(1, mma))
    s = gl.arange(0, Q, gl.SliceLayout(0, mma))
    for i in gl.static_range(STAGES):
        stage = (before + i) % STAGES
        _load_pair(B_desc, C_desc, Bs, Cs, full.index(stage), stage, b, begin + i * step, end, total)
    count = (gl.maximum(end - begin, 0) + step - 1) // step
    for i in range(before, before + count):
        c = begin + (i - before) * step
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        B = Bs.index(stage).reshape([Q, N])
        C = Bs.index(STAGES + stage).reshape([Q, N])
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        scores = warpgroup_mma(C, B.permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        sync_threads()
        _load_pair(B_desc, C_desc, Bs, Cs, full.index(stage), stage, b, c + STAGES * step, end, total)
        row = (b * groups * total + c).to(gl.int64) * (Q * Q)
        gl.store(scores_ptr + row + (t[:, None] * Q + s[None, :]), scores)
    _fence_copies(count)
    sync_threads()
    return before + count


@gluon.jit
def _score_by_turns(B_desc, C_desc, scores_ptr, turn_ptr, done_ptr, Bs, Cs, full, b, turns, each, total, groups):
    """C B^T of a sequence by all blocks that run, each of which takes `each` chunks at a turn while there are turns.

    So whoever waits for scores waits for blocks that have started, however many find room at a time.
    """
    last = turns + gl.num_programs(0) - 1  # of all that ask
    turn = gl.atomic_add(turn_ptr, 1, sem="relaxed")
    done = turn * 0
    while turn < turns:
        coming = gl.atomic_add(turn_ptr, 1, sem="relaxed")
        begin = turn * each
        end = gl.minimum(begin + each, groups * total)
        done = _score(B_desc, C_desc, scores_ptr, Bs, Cs, full, done, b, begin, end, 1, total, groups)
        gl.atomic_add(done_ptr, 1, sem="release")
        turn = coming
    if turn == last:
        gl.atomic_xchg(turn_ptr, 0, sem="relaxed")


@gluon.jit
def _await_scores(done_ptr, scorers, readers):
    """Wait until a segment's scores are there. The last of its readers leaves the count at zero."""
    seen = 0
    while seen < scorers:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [done_ptr], dtype=gl.int32, is_pure=False, pack=1
        )
    sync_threads()
    thread = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $3, 0; @p red.relaxed.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0;}",
        "=r,l,r,r",
        [done_ptr + thread * 0, scorers + readers - 1 + thread * 0, (thread == 0).to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    _fence_copies(scorers)
