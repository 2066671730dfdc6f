"""What the reference ops share: compute dtypes, scratch memory that autograd may refuse, SiLU with an output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def compute_dtype_of(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors is float64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class Scratch:
    """Named buffers, allocated once per call and reused by each of its blocks: fresh pages cost more than arithmetic.

    ``scratch("name", shape)`` is what an ``out=`` argument takes: a buffer, or None while autograd records, since it
    must keep every intermediate result. One spelling of the maths thus serves both.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, recording: bool) -> None:
        self.dtype, self.device, self.recording = dtype, device, recording
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        if self.recording:
            return None
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return buffer[:size].view(shape)


def cast(tensor: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """``tensor`` in ``dtype``: itself where it already is, else written to ``out`` (or to new memory without one)."""
    if tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype) if out is None else out.copy_(tensor)


def silu(tensor: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """SiLU computed in ``dtype``, written to ``out`` where there is one."""
    if out is None:
        return F.silu(tensor.to(dtype))
    if tensor.dtype == dtype:
        return torch.ops.aten.silu.out(tensor, out=out)
    return F.silu(out.copy_(tensor), inplace=True)
