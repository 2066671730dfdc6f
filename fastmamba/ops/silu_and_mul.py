"""The gate of a SwiGLU multilayer perceptron (Shazeer, 2020)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmamba.ops._checks import Forms, check_input, check_kernel_dtype, needs_grad, remember_form, seen_form
from fastmamba.ops._dispatch import resolve_backend
from fastmamba.ops._library import register
from fastmamba.ops._repeats import Repeats
from fastmamba.reference.silu_and_mul import silu_and_mul as reference


def silu_and_mul(x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(x[..., :I]) * x[..., I:], in one pass.

    Args:
        x: (B, T, 2 I), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, I), contiguous, in the dtype of x; silu is rounded to it before the product, as plain PyTorch does.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype, or an empty input.
        RuntimeError: backend="triton" where it cannot run.
    """
    kind = (backend,)
    found = _repeats.again((x,), kind)
    if found is not None:
        return found
    form = seen_form(_forms, (x,), ())
    if form is not True:
        check_input("x", x, 3, "(B, T, 2 I)")
        if x.shape[2] % 2:
            raise ValueError(f"x must have an even last axis, got shape {tuple(x.shape)} for (B, T, 2 I)")
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if needs_grad(x):
        return reference(x)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.silu_and_mul(x, backend)
    return _repeats.run((x,), kind, _run, x, backend)


_forms = Forms()
_repeats = Repeats()


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.silu_and_mul import silu_and_mul

    return silu_and_mul


def _run(x: Tensor, backend: str) -> Tensor:
    return _kernel()(x) if backend == "triton" else reference(x).contiguous()


def _fake(x: Tensor, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], x.shape[2] // 2))


register("silu_and_mul(Tensor x, str backend) -> Tensor", _run, _fake)
