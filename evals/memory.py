"""Peak memory of a call, and a ceiling for what a process may take."""

from __future__ import annotations

import ctypes
import sys
from types import TracebackType

import torch


class Peak:
    """Context manager: `.extra` is how far memory rose above what was in use on entry, in bytes.

    Allocated memory on CUDA; on a CPU the resident set, which Linux alone lets us reset. `.extra` is None elsewhere.
    """

    extra: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self._base = _reset_peak_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._base is None:
            return
        if self.device.type == "cuda":
            self.extra = torch.cuda.max_memory_allocated(self.device) - self._base
        else:
            self.extra = max(0, _resident("VmHWM") - self._base)


def _reset_peak_resident() -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the last call freed must not hide what this one takes
    except AttributeError:
        pass  # another libc than glibc
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def limit() -> None:
    """Turn outgrowing a CPU's memory into an exception: past what is free now, allocations fail."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                available = min(available, int(file.read()))
        except (OSError, ValueError):
            continue  # another hierarchy, or "max"
    import resource  # not there on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    ceiling = int(available * 0.95)
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard), hard))


def exhausted(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return "not enough memory" in message or "can't allocate memory" in message or "out of memory" in message
