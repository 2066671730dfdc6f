"""GPU time of a call (a CUDA graph of it, replayed), wall time of calling it, and what the machine does at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COLD_BYTES = 256 << 20  # several times the L2 cache of any GPU there is


class Timer:
    """Times calls on one GPU, each with a cold L2 cache."""

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self.device = device
        self.repeats = repeats
        self._flush = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)

    def cool(self) -> None:
        """Overwrite the cache."""
        self._flush.fill_(1)

    def gpu(self, call: Callable[[], object]) -> dict[str, Any]:
        """Milliseconds between two events around a replay of `call`, captured; `call` must have run before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = call()
        times = self.events(graph.replay)
        del held
        return summary(times)

    def events(self, call: Callable[[], object]) -> list[float]:
        """Milliseconds between two events around what `call` enqueues, repeated.

        The cache is overwritten in the same stream just before, so that the GPU is busy while the host enqueues.
        """
        pairs = []
        call()
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cool()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]

    def eager(self, call: Callable[[], object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Milliseconds of a call from an idle GPU: until its last kernel is done, and until the host may go on."""
        wall, host = [], []
        for _ in range(self.repeats + 3):
            self.cool()
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            result = call()
            enqueued = time.perf_counter()
            torch.cuda.synchronize(self.device)
            done = time.perf_counter()
            del result  # freeing is not part of the call
            wall.append((done - start) * 1e3)
            host.append((enqueued - start) * 1e3)
        return summary(wall[3:]), summary(host[3:])


def summary(ms: list[float]) -> dict[str, Any]:
    """Median, quartiles and range of repeated timings."""
    low, _, high = statistics.quantiles(ms, n=4)
    return {
        "median_ms": statistics.median(ms),
        "quartiles_ms": [low, high],
        "min_ms": min(ms),
        "max_ms": max(ms),
        "repeats": len(ms),
    }


def ceilings(timer: Timer) -> dict[str, float]:
    """What this machine does at best, now: bytes/s read and written by a device copy, and bfloat16 matrix flop/s."""
    source = torch.randint(-128, 127, (2 << 30,), dtype=torch.int8, device=timer.device)
    target = torch.empty_like(source)
    copy_ms = statistics.median(timer.events(lambda: target.copy_(source)))
    size = 8192
    a, b = (torch.randn(size, size, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    matmul_ms = statistics.median(timer.events(lambda: torch.mm(a, b, out=c)))
    return {"copy_bytes_per_s": 2 * source.nbytes / copy_ms * 1e3, "matmul_flop_per_s": 2 * size**3 / matmul_ms * 1e3}
