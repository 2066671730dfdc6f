"""Counters and flags by which the blocks of one launch agree, all zero when it starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmamba.kernels import _launch

_kept: dict[tuple[int, int], Tensor] = {}


def zeros_left_as_found(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros, for a kernel that leaves them zero.

    They are kept for the stream's next launch, which cannot start before this one ends: a memory of zeros of one's own
    costs a launch. A captured graph may be replayed on any stream, so it gets its own.
    """
    found = _zeros(count, device)
    noted = _launch.recorder
    if noted is not None:
        noted.given(found, lambda: _zeros(count, device))
    return found


def _zeros(count: int, device: torch.device) -> Tensor:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = index, torch._C._cuda_getCurrentRawStream(index)
    found = _kept.get(key)
    if found is None or found.numel() < count:
        found = _kept[key] = torch.zeros(max(4096, 1 << (count - 1).bit_length()), dtype=torch.int32, device=device)
    return found
