"""RMSNorm before a layer's branch, alone or with the residual add that leads to it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmamba.ops._checks import (
    Forms,
    check_dtype,
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
from fastmamba.reference.rms_norm import add_rms_norm as reference_add_norm
from fastmamba.reference.rms_norm import rms_norm as reference_norm


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """RMSNorm over the last axis (Zhang and Sennrich, 2019).

        y = weight round(x / sqrt(mean(x^2) + eps))

    Arithmetic is in float32; `round` is to `dtype`, where transformers' norms round.

    Args:
        x: (B, T, D), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        weight: (D,), any floating dtype.
        eps: added to the mean square, > 0 or 0.
        dtype: x is rounded to it first; None leaves x as it is.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, D), contiguous, in the promotion of `dtype` with the dtype of weight.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run.
    """
    tensors, kind = (x, weight), (eps, dtype, backend)
    found = _norms.again(tensors, kind)
    if found is not None:
        return found
    form = seen_form(_forms, tensors, (eps, dtype))
    if form is not True:
        _check(x, None, weight, eps, dtype)
        remember_form(_forms, form)
    dtype = dtype or x.dtype
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if needs_grad(x, weight):
        return reference_norm(x, weight, eps, dtype)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.rms_norm(x, weight, eps, dtype, backend)
    return _norms.run(tensors, kind, _run, x, weight, eps, dtype, backend)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    factor: float = 1.0,
    sum_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the norm that starts the next, in one pass.

        s = residual + factor x;   y = weight round(s / sqrt(mean(s^2) + eps))

    Arithmetic is in float32. factor x is rounded to the dtype of x and s to `sum_dtype`, as plain PyTorch does.

    Args:
        x: (B, T, D), what the branch returned: float16, bfloat16 or float32 (float64 too on the torch backend).
        residual: (B, T, D), any of these dtypes.
        weight: (D,), any floating dtype.
        eps: added to the mean square, > 0 or 0.
        factor: multiplies x (Granite's residual_multiplier).
        sum_dtype: dtype of s; None promotes the dtypes of x and residual.
        dtype: s is rounded to it before the norm; None leaves s as it is.
        backend: "auto", "triton" or "torch".

    Returns:
        y (B, T, D), in the promotion of `dtype` with the dtype of weight, and s (B, T, D). Both are contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run.
    """
    tensors, kind = (x, residual, weight), (eps, factor, sum_dtype, dtype, backend)
    found = _sums.again(tensors, kind)
    if found is not None:
        return found
    form = seen_form(_forms, tensors, (eps, dtype, sum_dtype))
    if form is not True:
        _check(x, residual, weight, eps, dtype, sum_dtype)
        remember_form(_forms, form)
    sum_dtype = sum_dtype or torch.promote_types(x.dtype, residual.dtype)
    dtype = dtype or sum_dtype
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    arguments = (x, residual, weight, eps, float(factor), sum_dtype, dtype)
    if needs_grad(x, residual, weight):
        return reference_add_norm(*arguments)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.add_rms_norm(*arguments, backend)
    return _sums.run(tensors, kind, _run_add, *arguments, backend)


_forms = Forms()
_norms, _sums = Repeats(), Repeats()


def _check(
    x: Any, residual: Any, weight: Any, eps: Any, dtype: torch.dtype | None, sum_dtype: torch.dtype | None = None
) -> None:
    check_input("x", x, 3, "(B, T, D)")
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), "(B, T, D)", x.device)
    check_tensor("weight", weight, (x.shape[-1],), "(D,)", x.device)
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps!r}")
    check_dtype("dtype", dtype)
    check_dtype("sum_dtype", sum_dtype)


@functools.cache
def _kernels() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels import rms_norm

    return rms_norm


def _run(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    if backend == "triton":
        return _kernels().rms_norm(x, weight, eps, dtype)
    return reference_norm(x, weight, eps, dtype).contiguous()


def _run_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    factor: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return _kernels().add_rms_norm(x, residual, weight, eps, factor, sum_dtype, dtype)
    y, total = reference_add_norm(x, residual, weight, eps, factor, sum_dtype, dtype)
    return y.contiguous(), total.contiguous()


def _fake(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype))


def _fake_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    factor: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype))
    return y, x.new_empty(x.shape, dtype=sum_dtype)


register("rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype, str backend) -> Tensor", _run, _fake)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float factor, ScalarType sum_dtype, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _run_add,
    _fake_add,
)
