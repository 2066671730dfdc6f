"""What every launcher shares."""

from __future__ import annotations

import contextlib

import torch


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current while a kernel is launched: Triton launches on the current one."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last axis is contiguous (every view of a projection), else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
