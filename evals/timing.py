"""Wall time of one call, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that `call` takes until its last kernel is done; its result is dropped."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3


def summary(ms: list[float]) -> dict[str, Any]:
    """Median and range of repeated timings, with the timings themselves."""
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "max_ms": max(ms), "ms": ms}
