"""Counters and flags by which the blocks of one launch agree, all zero when it starts."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastmamba.kernels import _launch

_kept: dict[tuple[int, int], Tensor] = {}


def zeros_left_as_found(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros, for a kernel that leaves them zero.

    They are kept for the stream's next launch, which cannot start before this one ends: a memory of zeros of one's own
    costs a launch. A captured graph may be replayed on any stream, so each launch in it gets its own, for good.
    """
    found = _zeros(count, device)
    noted = _launch.recorder
    if noted is not None:
        noted.given(found, lambda: _zeros(count, device))
    return found


class Spare:
    """Zeros that were made before a capture, to be given away in it: zeros made in it are filled at every replay."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._device = device
        self._all: list[Tensor] = []  # graphs know addresses only
        self._used = size
        self._lock = threading.Lock()

    def refill(self) -> None:
        """Make sure that at least half of `size` is there."""
        if 2 * self._used <= self._size:
            return
        with _disable_current_modes():  # not a part of a call that is being noted down
            new = torch.zeros(self._size, dtype=torch.int32, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a graph may be replayed on another stream than this one
        with self._lock:
            self._all.append(new)
            self._used = 0

    def take(self, count: int) -> Tensor | None:
        """`count` zeros that nobody else gets; None if they are used up."""
        with self._lock:
            first = self._used
            if first + count > self._size:
                return None
            self._used += -(-count // 32) * 32  # whole cache lines
            whole = self._all[-1]
        with _disable_current_modes():
            return whole[first : first + count]


_spare: dict[int, Spare] = {}
_SPARE = 1 << 18  # a MiB, which 64 layers of a prefill take half of


def _zeros(count: int, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    spare = _spare.get(index)
    if torch.cuda.is_current_stream_capturing():
        part = None if spare is None else spare.take(count)
        return torch.zeros(count, dtype=torch.int32, device=device) if part is None else part
    if spare is None:
        spare = _spare[index] = Spare(_SPARE, device)
    spare.refill()
    key = index, torch._C._cuda_getCurrentRawStream(index)
    found = _kept.get(key)
    if found is None or found.numel() < count:
        found = _kept[key] = torch.zeros(max(4096, 1 << (count - 1).bit_length()), dtype=torch.int32, device=device)
    return found
