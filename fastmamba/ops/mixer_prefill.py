"""A sequence through the middle of a Mamba-2 mixer: all between its projections."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastmamba.configs import forced
from fastmamba.ops._checks import (
    Forms,
    check_activation,
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
from fastmamba.ops.causal_conv1d import run as run_conv
from fastmamba.ops.gated_rms_norm import run as run_norm
from fastmamba.ops.mixer_step import GATES
from fastmamba.ops.ssd import PRECISIONS
from fastmamba.ops.ssd import run as run_ssd


def mixer_prefill(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    groups: int = 1,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    gate: str = "before",
    activation: str | None = "silu",
    dt_limit: tuple[float, float] = (0.0, math.inf),
    mask: Tensor | None = None,
    initial_conv: Tensor | None = None,
    final_conv: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    precision: str = "exact",
    state_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """All that a Mamba-2 mixer does to a sequence between its projections.

    What `causal_conv1d`, `ssd` and `gated_rms_norm` compute one after the other, in three launches:

        x, B, C = act(conv(xBC)) mask;  y = ssd(x, clamp(softplus(dt + dt_bias)), -exp(A_log), B, C, D)
        u = y silu(z);  out = norm_weight u / sqrt(mean_group(u^2) + eps)

    Args:
        projected: (B, T, 2*D + 2*G*N + H), the input projection: z (D) | x (D) | B (G*N) | C (G*N) | dt (H), with
            D = H*P. float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        conv_weight: (D + 2*G*N, W), or as `torch.nn.Conv1d` has it (D + 2*G*N, 1, W), any floating dtype.
        conv_bias: (D + 2*G*N,).
        A_log, D, dt_bias: (H,), any floating dtype.
        groups: G, a divisor of H.
        norm_weight: (D,), of the gated RMSNorm; None for no norm.
        eps: of the norm, 0 or more.
        group_size: channels the norm takes together, a divisor of D; None takes all.
        gate: "before" the norm, "after" it, or "none": z is then left to the caller, and there can be no norm.
        activation: of the convolution: "silu", its other name "swish", or None.
        dt_limit: (low, high) bounds of softplus(dt + dt_bias).
        mask: (B, T), multiplies the convolution's output.
        initial_conv: (B, D + 2*G*N, W - 1), the convolution's inputs before the first token, oldest first.
        final_conv: (B, D + 2*G*N, S), overwritten with its last inputs, see `causal_conv1d`.
        initial_states: (B, H, P, N), any floating dtype; None starts from zero.
        return_final_states: also return the state after the last token.
        precision, state_dtype: see `ssd`.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, D), contiguous, in the dtype of projected; and with `return_final_states` the final states (B, H, P, N)
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or autograd would have to see `final_conv` change.
    """
    weights = (conv_weight, conv_bias, A_log, D, dt_bias, norm_weight)
    states = (mask, initial_conv, final_conv, initial_states)
    options = (groups, eps, group_size, gate, activation, dt_limit, precision, state_dtype)
    tensors = (projected, *weights, *states)
    kind = (*options, return_final_states, backend)
    found = _repeats.again(tensors, kind)
    if found is not None:
        return found if return_final_states else found[0]
    form = seen_form(_forms, tensors, options)
    if form is not True:
        _check(projected, *weights, *states, *options)
        remember_form(_forms, form)
    backend = resolve_backend(backend, projected.device)
    if backend == "triton":
        check_kernel_dtype("projected", projected)
    execute: Any = torch.ops.fastmamba.mixer_prefill
    if not torch.compiler.is_compiling():
        execute = functools.partial(_repeats.run, tensors, kind, _run)
    if needs_grad(projected, *weights, mask, initial_conv, initial_states):
        if final_conv is not None:
            raise RuntimeError("mixer_prefill overwrites final_conv, which autograd cannot record: leave it out")
        execute, backend = _run, "torch"
    y, final_states = execute(
        projected,
        *weights,
        *states,
        groups,
        eps,
        group_size,
        gate,
        activation,
        float(dt_limit[0]),
        float(dt_limit[1]),
        return_final_states,
        precision,
        state_dtype,
        backend,
    )
    return (y, final_states) if return_final_states else y


_forms = Forms()
_repeats = Repeats(forced)


def _check(
    projected: Any,
    conv_weight: Any,
    conv_bias: Any,
    A_log: Any,
    D: Any,
    dt_bias: Any,
    norm_weight: Any,
    mask: Any,
    initial_conv: Any,
    final_conv: Any,
    initial_states: Any,
    groups: Any,
    eps: Any,
    group_size: Any,
    gate: Any,
    activation: Any,
    dt_limit: Any,
    precision: Any,
    state_dtype: Any,
) -> None:
    axes = "(B, T, 2*D + 2*G*N + H)"
    check_input("projected", projected, 3, axes)
    check_input("A_log", A_log, 1, "(H,)")
    if isinstance(conv_weight, Tensor) and conv_weight.ndim == 3 and conv_weight.shape[1] == 1:
        conv_weight = conv_weight.squeeze(1)
    check_input("conv_weight", conv_weight, 2, "(D + 2*G*N, W)")
    batch, tokens, row = projected.shape
    heads, device = A_log.shape[0], projected.device
    channels, taps = conv_weight.shape
    if groups < 1:
        raise ValueError(f"groups must be 1 or more, got {groups}")
    check_groups("groups", groups, heads)
    inner = row - channels - heads
    if inner < heads or inner % heads or channels <= inner or (channels - inner) % (2 * groups):
        raise ValueError(
            f"projected must have shape {axes}, which no D and N fit with H = {heads} of A_log, G = {groups} and "
            f"D + 2*G*N = {channels} of conv_weight, got {tuple(projected.shape)}"
        )
    width = (channels - inner) // (2 * groups)
    check_tensor("conv_weight", conv_weight, (channels, taps), "(D + 2*G*N, W)", device)
    if conv_bias is not None:
        check_tensor("conv_bias", conv_bias, (channels,), "(D + 2*G*N,)", device)
    for name, tensor in (("A_log", A_log), ("D", D), ("dt_bias", dt_bias)):
        check_tensor(name, tensor, (heads,), "(H,)", device)
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (inner,), "(D,)", device)
        if gate == "none":
            raise ValueError("gate must be 'before' or 'after' where there is a norm, got 'none'")
    if group_size is not None and (group_size < 1 or inner % group_size):
        raise ValueError(f"group_size must divide D = {inner}, got {group_size}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps!r}")
    check_activation(activation)
    check_dt_limit(dt_limit)
    if mask is not None:
        check_tensor("mask", mask, (batch, tokens), "(B, T)", device, floating=False)
    if initial_conv is not None:
        check_tensor("initial_conv", initial_conv, (batch, channels, taps - 1), "(B, D + 2*G*N, W - 1)", device)
    if final_conv is not None:
        check_input("final_conv", final_conv, 3, "(B, D + 2*G*N, S)")
        check_tensor("final_conv", final_conv, (batch, channels, final_conv.shape[2]), "(B, D + 2*G*N, S)", device)
    if initial_states is not None:
        expected = (batch, heads, inner // heads, width)
        check_tensor("initial_states", initial_states, expected, "(B, H, P, N)", device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if state_dtype not in (torch.float32, projected.dtype):
        raise ValueError(
            f"state_dtype must be torch.float32 or the dtype of projected ({projected.dtype}), got {state_dtype!r}"
        )


_Y_SCALE = {torch.float16: 2.0**-4}
"""What the scan's output is multiplied by where it is rounded for a norm, which with eps times the square undoes it.

float16 ends at 65,504, which the scan's output can pass as a sequence grows; this way it ends at a million. A power of
two changes no digit of numbers from 1e-3 on. Smaller ones, subnormal then, keep the absolute accuracy of those: enough
for the norm, whose eps (of 1e-6, which is 1e-3 squared, or more) takes over in rows that small.
"""


def _run(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor | None,
    mask: Tensor | None,
    initial_conv: Tensor | None,
    final_conv: Tensor | None,
    initial_states: Tensor | None,
    groups: int,
    eps: float,
    group_size: int | None,
    gate: str,
    activation: str | None,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    precision: str,
    state_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if conv_weight.ndim == 3:
        conv_weight = conv_weight.squeeze(1)
    batch, tokens, row = projected.shape
    heads, channels = A_log.shape[0], conv_weight.shape[0]
    inner = row - channels - heads
    z, conv_in, dt = projected.split_with_sizes((inner, channels, heads), -1)
    conv_out = run_conv(conv_in, conv_weight, conv_bias, initial_conv, mask, final_conv, activation, backend)
    both = (channels - inner) // 2
    x, B, C = conv_out.split_with_sizes((inner, both, both), -1)
    y_scale = _Y_SCALE.get(projected.dtype, 1.0) if norm_weight is not None else 1.0
    y, final_states = run_ssd(
        x.view(batch, tokens, heads, -1),
        dt,
        A_log,
        B.view(batch, tokens, groups, -1),
        C.view(batch, tokens, groups, -1),
        D,
        z.view(batch, tokens, heads, -1) if norm_weight is None and gate != "none" else None,
        dt_bias,
        initial_states,
        True,
        dt_min,
        dt_max,
        return_final_states,
        None,
        precision,
        state_dtype,
        backend,
        True,
        y_scale,
    )
    del conv_out, x, B, C  # what the norm does not need is memory that it can have
    y = y.view(batch, tokens, inner)
    if norm_weight is not None:
        y = run_norm(y, norm_weight, z, eps * y_scale**2, group_size or inner, gate == "after", backend, True)
    return y, final_states


def _fake(projected: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, row = projected.shape
    (conv_weight, _, A_log), groups = arguments[:3], arguments[10]
    heads, channels = A_log.shape[0], conv_weight.shape[0]
    inner = row - channels - heads
    state = (batch, heads, inner // heads, (channels - inner) // (2 * groups))
    dtype = torch.promote_types(projected.dtype, torch.float32)
    y = projected.new_empty((batch, tokens, inner))
    return y, projected.new_empty(state if arguments[17] else (0,), dtype=dtype)


register(
    "mixer_prefill(Tensor projected, Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor D, Tensor dt_bias, "
    "Tensor? norm_weight, Tensor? mask, Tensor? initial_conv, Tensor(a!)? final_conv, Tensor? initial_states, "
    "int groups, float eps, int? group_size, str gate, str? activation, float dt_min, float dt_max, "
    "bool return_final_states, str precision, ScalarType state_dtype, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
)
