"""Checks and times configurations of the SSD on the GPU, one request a line; `tune.py` starts it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")  # whatever prints must not come between
    os.dup2(2, 1)
    requests = map(json.loads, sys.stdin)
    bench = Bench(**next(requests))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for request in requests:
        try:
            reply = bench.check(request["check"]) if "check" in request else bench.time(request["time"])
        except Exception as error:
            reply = {"failure": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            reply |= {"last": not bench.alive()}
        print(json.dumps(reply), file=replies, flush=True)
        if reply.get("last"):
            return


class Bench:
    """One shape's inputs, and what its results have to be."""

    def __init__(self, shape: dict[str, Any], dtype: str, seed: int = 0, repeats: int = 10) -> None:
        import torch

        from evals.gpu_timing import Timer
        from evals.ssd_check import allowed
        from evals.ssd_grid import Shape

        self.device = torch.device("cuda", torch.cuda.current_device())
        self.timer = Timer(self.device, repeats)
        self.case = Shape(**shape).case(getattr(torch, dtype), self.device, seed)
        self.limits = allowed(self.case)
        # The first configuration that is right against float64 becomes what the others are held against: comparing with
        # it takes a thousandth of the time.
        self.right: Any = None

    def run(self, config: dict[str, Any]) -> Any:
        from fastmamba import configs
        from fastmamba.ops import ssd

        with configs.override(configs.SsdConfig(**config)):
            return ssd(*self.case.arguments(), **self.case.keywords(), backend="triton")

    def check(self, config: dict[str, Any]) -> dict[str, Any]:
        """Compile, run and compare."""
        import torch

        from evals.ssd_check import errors
        from fastmamba.testing import relative_error

        block = torch.full(self.case.x.shape, torch.nan, dtype=self.case.x.dtype, device=self.device)
        del block  # the allocator hands this memory out next: what is not written will show
        result = self.run(config)
        torch.cuda.synchronize()
        if self.right is None:
            (off,) = errors(self.case, [result])
        else:
            off = tuple(relative_error(found, right) for found, right in zip(result, self.right, strict=True))
        if not all(error <= limit for error, limit in zip(off, self.limits, strict=True)):
            return {"failure": f"wrong: y errs {off[0]:.1e}, states {off[1]:.1e}, allowed {self.limits}"}
        if self.right is None:
            self.right = result
        return {}

    def time(self, config: dict[str, Any]) -> dict[str, Any]:
        self.run(config)  # compiled, maybe by another process: loads it
        gpu = self.timer.gpu(lambda: self.run(config))
        return {"us": gpu["median_ms"] * 1e3}

    def alive(self) -> bool:
        """Whether the GPU still answers: after an illegal access it does not, until the process ends."""
        import torch

        try:
            torch.cuda.synchronize()
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False


if __name__ == "__main__":
    main()
