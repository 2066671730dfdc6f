"""SSD prefill: the selective state space scan of Mamba-2 over a whole sequence."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastmamba.configs import forced
from fastmamba.ops._checks import (
    Forms,
    check_dt_limit,
    check_groups,
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
from fastmamba.reference.ssd import ssd as reference_ssd

PRECISIONS = ("exact", "relaxed")
"""What a `precision` argument may be."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    chunk_size: int | None = None,
    precision: str = "exact",
    state_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state space scan (state space duality, SSD) over a sequence.

    For each batch row and head, with the state h of shape (P, N):

        dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)      (each part only where asked for)
        h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t  = (h_t C_t + D x_t) silu(z_t)

    computed chunk by chunk with matrix products (Dao and Gu, "Transformers are SSMs", section 6). On a GPU all of it is
    one Triton launch or two.

    Args:
        x: (B, T, H, P), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        dt: (B, T, H), any floating dtype.
        A: (H,), negative in a stable model.
        B, C: (B, T, G, N), dtype of x; G divides H.
        D: (H,) or (H, P), the skip connection.
        z: (B, T, H, P), dtype of x, the gate.
        dt_bias: (H,).
        initial_states: (B, H, P, N), any floating dtype; None starts from zero.
        dt_softplus: apply softplus to dt (after dt_bias).
        dt_limit: (low, high) bounds of dt, applied last.
        return_final_states: also return the state after the last token.
        chunk_size: tokens per chunk, a power of two from 16 to 256; None lets the backend choose. The Triton kernel
            takes smaller chunks where such ones do not fit the GPU's shared memory.
        precision: "exact" keeps in float32 what the kernels of mamba_ssm keep in float32; "relaxed" lets the Triton
            kernels multiply decays and scores in the dtype of x, as the PyTorch blog's fused kernel does.
        state_dtype: dtype in which the Triton kernel hands states from one part of the sequence to the next: float32 or
            the dtype of x.
        backend: "auto", "triton" or "torch".

    Returns:
        y (B, T, H, P), contiguous, in the dtype of x; and with `return_final_states` the final states (B, H, P, N) in
        float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument that is not a tensor where one is needed.
        ValueError: shapes, dtypes or devices that do not fit, an empty input, a bad `dt_limit`, `chunk_size`,
            `precision`, `state_dtype` or `backend`.
        RuntimeError: backend="triton" where it cannot run.
    """
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    options = (dt_limit, chunk_size, precision, state_dtype)
    kind = (*options, dt_softplus, return_final_states, backend)
    found = _repeats.again(arguments, kind)
    if found is not None:
        return found if return_final_states else found[0]
    form = seen_form(_forms, arguments, options)
    if form is not True:
        _check(*arguments, *options)
        remember_form(_forms, form)
    dt_min, dt_max = float(dt_limit[0]), float(dt_limit[1])
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        if x.dtype == torch.float64:
            check_kernel_dtype("x", x)
        if max(x.shape[3], B.shape[3]) > 256:
            raise ValueError(f"backend='triton' takes P and N up to 256, got P={x.shape[3]}, N={B.shape[3]}")

    if needs_grad(*arguments):
        y, final_states = reference_ssd(*arguments, dt_softplus, dt_min, dt_max, chunk_size)
    else:
        execute: Any = torch.ops.fastmamba.ssd
        if not torch.compiler.is_compiling():
            execute = functools.partial(_repeats.run, arguments, kind, run)
        y, final_states = execute(
            *arguments,
            dt_softplus,
            dt_min,
            dt_max,
            return_final_states,
            chunk_size,
            precision,
            state_dtype,
            backend,
            False,
        )
    return (y, final_states) if return_final_states else y


_forms = Forms()
_repeats = Repeats(forced)


def _check(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    dt_bias: Any,
    initial_states: Any,
    dt_limit: Any,
    chunk_size: Any,
    precision: Any,
    state_dtype: Any,
) -> None:
    check_input("x", x, 4, "(B, T, H, P)")
    batch, tokens, heads, head_dim = x.shape
    device = x.device
    check_input("B", B, 4, "(B, T, G, N)")
    groups, state = B.shape[2], B.shape[3]
    check_tensor("dt", dt, (batch, tokens, heads), "(B, T, H)", device)
    check_tensor("A", A, (heads,), "(H,)", device)
    check_tensor("B", B, (batch, tokens, groups, state), "(B, T, G, N)", device, x.dtype)
    check_tensor("C", C, (batch, tokens, groups, state), "(B, T, G, N)", device, x.dtype)
    check_groups("B", groups, heads)
    if D is not None:
        per_head = isinstance(D, Tensor) and D.ndim == 1
        check_tensor("D", D, (heads,) if per_head else (heads, head_dim), "(H,) or (H, P)", device)
    if z is not None:
        check_tensor("z", z, (batch, tokens, heads, head_dim), "(B, T, H, P)", device, x.dtype)
    if dt_bias is not None:
        check_tensor("dt_bias", dt_bias, (heads,), "(H,)", device)
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (batch, heads, head_dim, state), "(B, H, P, N)", device)
    check_dt_limit(dt_limit)
    if chunk_size is not None and chunk_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_size must be 16, 32, 64, 128, 256 or None, got {chunk_size!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if state_dtype not in (torch.float32, x.dtype):
        raise ValueError(f"state_dtype must be torch.float32 or the dtype of x ({x.dtype}), got {state_dtype!r}")


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.ssd import ssd

    return ssd


def run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    chunk_size: int | None,
    precision: str,
    state_dtype: torch.dtype,
    backend: str,
    log_A: bool,
    y_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Run it, checked. With `log_A`, A holds log(-A), as models store it. y is rounded times `y_scale`."""
    if backend == "triton":
        arguments = (x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max)
        rest = (return_final_states, chunk_size, state_dtype, precision == "relaxed", log_A, y_scale)
        return _kernel()(*arguments, *rest)
    if log_A:
        A = -torch.exp(A.to(torch.promote_types(A.dtype, torch.float32)))
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max)
    y, final_states = reference_ssd(*arguments, chunk_size, y_scale)
    return y, final_states if return_final_states else final_states.new_empty(0)


def _fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    chunk_size: int | None,
    precision: str,
    state_dtype: torch.dtype,
    backend: str,
    log_A: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, heads, head_dim = x.shape
    shape = (batch, heads, head_dim, B.shape[3]) if return_final_states else (0,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype)


register(
    "ssd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, bool dt_softplus, float dt_min, float dt_max, bool return_final_states, "
    "int? chunk_size, str precision, ScalarType state_dtype, str backend, bool log_A) -> (Tensor, Tensor)",
    run,
    _fake,
)
