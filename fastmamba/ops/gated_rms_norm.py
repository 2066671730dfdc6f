"""Root-mean-square norm with a SiLU gate, as after the SSD in every Mamba-2 mixer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmamba.ops._checks import (
    Forms,
    check_input,
    check_kernel_dtype,
    check_tensor,
    needs_grad,
    remember_form,
    seen_form,
)
from fastmamba.ops._dispatch import resolve_backend
from fastmamba.ops._library import register
from fastmamba.ops._repeats import Repeats
from fastmamba.reference.gated_rms_norm import gated_rms_norm as reference_norm


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm over groups of the last axis (Zhang and Sennrich, 2019), gated by silu(gate).

        u = x silu(gate);   y = weight u / sqrt(mean_group(u^2) + eps)             (norm_before_gate=False)
        y = weight x / sqrt(mean_group(x^2) + eps) silu(gate)                      (norm_before_gate=True)

    Arithmetic is in float32, rounded once.

    Args:
        x: (B, T, D), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        weight: (D,), any floating dtype.
        gate: (B, T, D), dtype of x, may be a strided view of the projection; None for a plain RMSNorm.
        eps: added to the mean square, > 0 or 0.
        group_size: channels per group, a divisor of D; None takes all D.
        norm_before_gate: gate after the norm instead of before.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, D), contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run.
    """
    tensors, kind = (x, weight, gate), (eps, group_size, norm_before_gate, backend)
    found = _repeats.again(tensors, kind)
    if found is not None:
        return found
    form = seen_form(_forms, tensors, (eps, group_size))
    if form is not True:
        _check(x, weight, gate, eps, group_size)
        remember_form(_forms, form)
    if group_size is None:
        group_size = x.shape[-1]
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if needs_grad(x, weight, gate):
        return reference_norm(x, weight, gate, eps, group_size, norm_before_gate)
    arguments = (*tensors, eps, group_size, norm_before_gate, backend)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.gated_rms_norm(*arguments)
    return _repeats.run(tensors, kind, run, *arguments)


_forms = Forms()
_repeats = Repeats()


def _check(x: Any, weight: Any, gate: Any, eps: Any, group_size: Any) -> None:
    check_input("x", x, 3, "(B, T, D)")
    width = x.shape[-1]
    check_tensor("weight", weight, (width,), "(D,)", x.device)
    if gate is not None:
        check_tensor("gate", gate, tuple(x.shape), "(B, T, D)", x.device, x.dtype)
    if group_size is not None and (group_size < 1 or width % group_size):
        raise ValueError(f"group_size must divide D = {width}, got {group_size}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps!r}")


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.gated_rms_norm import gated_rms_norm

    return gated_rms_norm


def run(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    backend: str,
    in_place: bool = False,
) -> Tensor:
    """Run it, checked. With `in_place`, x is contiguous and may be overwritten, with the result."""
    if backend == "triton":
        return _kernel()(x, weight, gate, eps, group_size, norm_before_gate, in_place)
    return reference_norm(x, weight, gate, eps, group_size, norm_before_gate)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "gated_rms_norm(Tensor x, Tensor weight, Tensor? gate, float eps, int group_size, bool norm_before_gate, "
    "str backend) -> Tensor",
    run,
    _fake,
)
