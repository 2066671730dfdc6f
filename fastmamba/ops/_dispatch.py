"""Which implementation serves a call: Triton kernels or plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
"""What a `backend` argument may be."""

_TRITON_DEVICES = ("cuda", "xpu")


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Found out here, without importing it: torch.compile refuses to trace how."""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return "triton" or "torch": what `backend` means for tensors on `device`.

    "auto" takes Triton on a GPU where the package is installed and PyTorch anywhere else. "triton" on the CPU is
    allowed only under TRITON_INTERPRET=1, Triton's debugging interpreter.

    Raises:
        ValueError: an unknown `backend`.
        RuntimeError: "triton" was asked for where it cannot run.
    """
    if backend == "torch":
        return "torch"
    on_gpu = device.type in _TRITON_DEVICES
    if backend == "auto":
        return "triton" if on_gpu and _TRITON_INSTALLED else "torch"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not _TRITON_INSTALLED:
        raise RuntimeError("backend='triton' needs the triton package, which is not installed")
    if not on_gpu and not _interpreted():
        raise RuntimeError(
            f"backend='triton' needs a GPU tensor, got one on {device} "
            "(on the CPU it runs only under TRITON_INTERPRET=1)"
        )
    return "triton"


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a GPU has programmatic dependent launch."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)
    )
