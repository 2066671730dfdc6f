"""What racecheck makes of a handover that an mbarrier orders: the smallest warp-specialised kernel, right and broken.

    for form in barrier mbarrier none; do
        compute-sanitizer --tool racecheck python evals/racecheck_control.py $form [--for-racecheck]
    done

A tile passes through shared memory, from threads that write it to others that read it, many times by the same place:

    barrier     one role: all threads write, meet at the block's barrier, read, and meet again
    mbarrier    two roles, a producer and a consumer, that wait for each other at two mbarriers, as in any pipeline
    none        the same two roles without waiting: a race

`barrier` and `mbarrier` are right, `none` must be reported. As Triton compiles it, `mbarrier` is reported as well; in
the form of `racecheck_ptx.py` it must be clean, and then so must be `fastmamba.kernels.ssd_hopper`. The output is
checked: it is the input, except in `none`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier  # noqa: E402

from evals import racecheck_ptx  # noqa: E402
from fastmamba.kernels._ssd_hopper_terms import sync_threads  # noqa: E402

SIZE = gl.constexpr(256)
ROUNDS = 16
WARP = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))  # stores one by one: racecheck does not see stmatrix
WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
OTHERWISE = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # an element is another thread's


@gluon.jit
def _produce(source, place, ready, free, rounds, WAITS: gl.constexpr):
    at = gl.arange(0, SIZE, WARP)
    for i in range(rounds):
        value = gl.load(source + i * SIZE + at)
        if WAITS:
            mbarrier.wait(free, i & 1 ^ 1)
        place.store(value)
        if WAITS:
            mbarrier.arrive(ready, count=1)


@gluon.jit
def _consume(target, place, ready, free, rounds, WAITS: gl.constexpr):
    at = gl.arange(0, SIZE, OTHERWISE)
    for i in range(rounds):
        if WAITS:
            mbarrier.wait(ready, i & 1)
        value = place.load(OTHERWISE)
        if WAITS:
            mbarrier.arrive(free, count=1)
        gl.store(target + i * SIZE + at, value)


@gluon.jit
def _kernel(source, target, rounds, FORM: gl.constexpr):
    place = gl.allocate_shared_memory(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if FORM == "barrier":
        for i in range(rounds):
            place.store(gl.load(source + i * SIZE + gl.arange(0, SIZE, WARPS)))
            sync_threads()
            gl.store(target + i * SIZE + gl.arange(0, SIZE, OTHERWISE), place.load(OTHERWISE))
            sync_threads()
    else:
        ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(ready, count=1)
        mbarrier.init(free, count=1)
        fence_async_shared()
        sync_threads()
        waits: gl.constexpr = FORM == "mbarrier"
        gl.warp_specialize(
            [
                (_consume, (target, place, ready, free, rounds, waits)),
                (_produce, (source, place, ready, free, rounds, waits)),
            ],
            [1],
            [64],
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("form", choices=("barrier", "mbarrier", "none"))
    parser.add_argument("--for-racecheck", action="store_true", help="in the form of racecheck_ptx.py")
    options = parser.parse_args()
    if options.for_racecheck:
        racecheck_ptx.install()
    form = options.form
    source = torch.randn(ROUNDS, SIZE.value, device="cuda")
    target = torch.full_like(source, float("nan"))
    kernel: Any = _kernel
    kernel[(1,)](source, target, ROUNDS, form, num_warps=4)
    right = torch.equal(source, target)
    print(f"{form}: the output is {'right' if right else 'WRONG'}", flush=True)
    return 0 if right or form == "none" else 1


if __name__ == "__main__":
    raise SystemExit(main())
