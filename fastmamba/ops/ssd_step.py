"""One token of the SSD recurrence, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmamba.ops._checks import check_groups, check_input, check_kernel_dtype, check_tensor, needs_grad
from fastmamba.ops._dispatch import resolve_backend
from fastmamba.ops._library import register
from fastmamba.reference.ssd_step import ssd_step as reference_step


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of `ssd`; `state` is changed in place. dt is not clamped, as in Transformers' one-token step.

    Args:
        state: (B, H, P, N), any floating dtype, changed in place. Any strides.
        x: (B, H, P), float16, bfloat16 or float32 (float64 too on the torch backend).
        dt: (B, H), any floating dtype.
        A: (H,).
        B, C: (B, G, N), dtype of x; G divides H.
        D: (H,) or (H, P).
        z: (B, H, P), dtype of x.
        dt_bias: (H,).
        dt_softplus: apply softplus to dt (after dt_bias).
        backend: "auto", "triton" or "torch".

    Returns:
        y (B, H, P), contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or autograd would have to see the in-place change.
    """
    check_input("x", x, 3, "(B, H, P)")
    batch, heads, head_dim = x.shape
    device = x.device
    check_input("B", B, 3, "(B, G, N)")
    groups, width = B.shape[1], B.shape[2]
    check_tensor("state", state, (batch, heads, head_dim, width), "(B, H, P, N)", device)
    check_tensor("dt", dt, (batch, heads), "(B, H)", device)
    check_tensor("A", A, (heads,), "(H,)", device)
    check_tensor("B", B, (batch, groups, width), "(B, G, N)", device, x.dtype)
    check_tensor("C", C, (batch, groups, width), "(B, G, N)", device, x.dtype)
    check_groups("B", groups, heads)
    if D is not None:
        per_head = isinstance(D, Tensor) and D.ndim == 1
        check_tensor("D", D, (heads,) if per_head else (heads, head_dim), "(H,) or (H, P)", device)
    if z is not None:
        check_tensor("z", z, (batch, heads, head_dim), "(B, H, P)", device, x.dtype)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), "(H,)", device)
    backend = resolve_backend(backend, device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if needs_grad(state):
        raise RuntimeError("ssd_step changes state in place, which must not require gradients")
    arguments = (state, x, dt, A, B, C, D, z, dt_bias)
    if needs_grad(*arguments):
        return reference_step(*arguments, dt_softplus)
    run = torch.ops.fastmamba.ssd_step if torch.compiler.is_compiling() else _run
    return run(*arguments, dt_softplus, backend)


def _run(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    backend: str,
) -> Tensor:
    arguments = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if backend == "triton":
        from fastmamba.kernels.ssd_step import ssd_step as kernel

        return kernel(*arguments)
    return reference_step(*arguments)


def _fake(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, str backend) -> Tensor",
    _run,
    _fake,
)
