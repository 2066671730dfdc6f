"""C B^T in the Hopper SSD for a state of 256: blocks that work it out, and how those that walk wait for it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_terms import Q, sync_threads
from fastmamba.kernels._ssd_hopper_wide_copies import STAGES, N, _load_pair


@gluon.jit
def _wait_for_launches_before():
    """What they wrote is visible then: this kernel starts while that of the scores still runs."""
    gl.inline_asm_elementwise("{griddepcontrol.wait; mov.b32 $0, 0;}", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fence_copies(n):
    """Between plain accesses to global memory and the copy engine's."""
    code: gl.constexpr = "{fence.proxy.async.global; mov.b32 $0, 0;}"
    gl.inline_asm_elementwise(code, "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _score(B_desc, C_desc, scores_ptr, done_ptr, Bs, Cs, full, which, scorers, b, first_chunk, chunks, total):
    """C B^T of every `scorers`-th of `chunks` from `which` on, for the blocks that walk them."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    sync_threads()
    t = gl.arange(0, Q, gl.SliceLayout(1, mma))
    s = gl.arange(0, Q, gl.SliceLayout(0, mma))
    for i in gl.static_range(STAGES):
        c = which + i * scorers
        _load_pair(B_desc, C_desc, Bs, Cs, full.index(i), i, b, (first_chunk + c) * Q, c < chunks)
    for i in range((chunks - which + scorers - 1) // scorers):  # there may be more scorers than chunks
        c = which + i * scorers
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        B = Bs.index(stage).reshape([Q, N])
        C = Bs.index(STAGES + stage).reshape([Q, N])
        zeros = gl.zeros((Q, Q), gl.float32, mma)
        scores = warpgroup_mma(C, B.permute([1, 0]), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        sync_threads()
        coming = c + STAGES * scorers
        _load_pair(B_desc, C_desc, Bs, Cs, full.index(stage), stage, b, (first_chunk + coming) * Q, coming < chunks)
        row = (b * total + first_chunk + c).to(gl.int64) * (Q * Q)
        gl.store(scores_ptr + row + (t[:, None] * Q + s[None, :]), scores)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
    _fence_copies(chunks)
    sync_threads()
    gl.atomic_add(done_ptr, 1, sem="release")


@gluon.jit
def _await_scores(done_ptr, scorers, readers):
    """Wait until the scores are there. The last of its readers leaves the count at zero."""
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
