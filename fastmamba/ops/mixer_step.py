"""One token through the middle of a Mamba-2 mixer, for generation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmamba.ops._checks import (
    Forms,
    check_activation,
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
from fastmamba.reference.mixer_step import mixer_step as reference_step

GATES = ("before", "after", "none")
"""Where z comes in: before the norm, after it, or not at all. Without a norm the first two are the same."""


def mixer_step(
    projected: Tensor,
    conv_state: Tensor,
    state: Tensor,
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
    addresses: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """All that a Mamba-2 mixer does to one token between its projections; both states are changed in place.

    What `causal_conv1d_update`, `ssd_step` and `gated_rms_norm` compute one after the other (dt is not clamped, as in
    Transformers' one-token step), in two launches and without rounding in between:

        x, B, C = act(conv(xBC));  dt = softplus(dt + dt_bias);  h = exp(-exp(A_log) dt) h + dt x B^T
        y = h C + D x;  u = y silu(z);  out = norm_weight u / sqrt(mean_group(u^2) + eps)

    Args:
        projected: (B, 2*D + 2*G*N + H), a row of the input projection: z (D) | x (D) | B (G*N) | C (G*N) | dt (H), with
            D = H*P. float16, bfloat16 or float32 (float64 too on the torch backend); channels contiguous.
        conv_state: (B, D + 2*G*N, S) with S >= W - 1, the inputs of the convolution before this one, oldest first, any
            floating dtype, any strides.
        state: (B, H, P, N), any floating dtype: arithmetic is in float32, and rounded to it. Any strides.
        conv_weight: (D + 2*G*N, W).
        conv_bias: (D + 2*G*N,).
        A_log, D, dt_bias: (H,).
        groups: G, a divisor of H.
        norm_weight: (D,), of the gated RMSNorm; None for no norm.
        eps: of the norm, 0 or more.
        group_size: channels the norm takes together, a divisor of D; None takes all.
        gate: "before" the norm, "after" it, or "none": z is then left to the caller, and there can be no norm.
        activation: of the convolution: "silu", its other name "swish", or None.
        addresses: (2,) int64 on the same device, the addresses of the conv state and the state to use instead of those
            given, which then only say what shape, dtype and strides these have. They are read when the kernels run, not
            when they are launched, so that one CUDA graph serves any cache. Must be multiples of 16. Triton only.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, D), contiguous, in the dtype of projected.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or gradients are needed: there is no backward.
    """
    tensors = (projected, conv_state, state, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, addresses)
    form = seen_form(_forms, tensors, (groups, eps, group_size, gate, activation))
    if form is not True:
        _check(*tensors, groups, eps, group_size, gate, activation)
        remember_form(_forms, form)
    if group_size is None:
        group_size = state.shape[1] * state.shape[2]
    backend = resolve_backend(backend, projected.device)
    if backend == "triton":
        check_kernel_dtype("projected", projected)
        if projected.stride(1) != 1:
            raise ValueError(f"projected must have contiguous channels, got strides {projected.stride()}")
    elif addresses is not None:
        raise ValueError("addresses needs backend='triton'")
    if needs_grad(*tensors):
        raise RuntimeError("mixer_step has no backward: call it under torch.no_grad()")
    run = torch.ops.fastmamba.mixer_step if torch.compiler.is_compiling() else _run
    return run(
        projected,
        conv_state,
        state,
        conv_weight,
        conv_bias,
        A_log,
        D,
        dt_bias,
        groups,
        norm_weight,
        eps,
        group_size,
        gate,
        activation,
        addresses,
        backend,
    )


_forms = Forms()


def _check(
    projected: Any,
    conv_state: Any,
    state: Any,
    conv_weight: Any,
    conv_bias: Any,
    A_log: Any,
    D: Any,
    dt_bias: Any,
    norm_weight: Any,
    addresses: Any,
    groups: Any,
    eps: Any,
    group_size: Any,
    gate: Any,
    activation: Any,
) -> None:
    check_input("projected", projected, 2, "(B, 2*D + 2*G*N + H)")
    check_input("state", state, 4, "(B, H, P, N)")
    batch, heads, head_dim, width = state.shape
    inner, device = heads * head_dim, projected.device
    if groups < 1:
        raise ValueError(f"groups must be 1 or more, got {groups}")
    check_groups("groups", groups, heads)
    channels = inner + 2 * groups * width
    check_tensor("projected", projected, (batch, inner + channels + heads), "(B, 2*D + 2*G*N + H)", device)
    check_tensor("state", state, (batch, heads, head_dim, width), "(B, H, P, N)", device)
    check_input("conv_weight", conv_weight, 2, "(D + 2*G*N, W)")
    taps = conv_weight.shape[1]
    check_tensor("conv_weight", conv_weight, (channels, taps), "(D + 2*G*N, W)", device)
    check_input("conv_state", conv_state, 3, "(B, D + 2*G*N, S)")
    check_tensor("conv_state", conv_state, (batch, channels, conv_state.shape[2]), "(B, D + 2*G*N, S)", device)
    if conv_state.shape[2] < taps - 1:
        raise ValueError(f"conv_state must hold at least W - 1 = {taps - 1} inputs, got {conv_state.shape[2]}")
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
    if addresses is not None:
        check_tensor("addresses", addresses, (2,), "(2,)", device, torch.int64, floating=False)


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.mixer_step import mixer_step

    return mixer_step


def _run(
    projected: Tensor,
    conv_state: Tensor,
    state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    groups: int,
    norm_weight: Tensor | None,
    eps: float,
    group_size: int,
    gate: str,
    activation: str | None,
    addresses: Tensor | None,
    backend: str,
) -> Tensor:
    weights = (conv_weight, conv_bias, A_log, D, dt_bias)
    options = (groups, norm_weight, eps, group_size, gate, activation)
    if backend == "triton":
        return _kernel()(projected, conv_state, state, *weights, *options, addresses)
    return reference_step(projected, conv_state, state, *weights, *options)


def _fake(projected: Tensor, conv_state: Tensor, state: Tensor, *_: object) -> Tensor:
    return projected.new_empty((state.shape[0], state.shape[1] * state.shape[2]))


register(
    "mixer_step(Tensor projected, Tensor(a!) conv_state, Tensor(b!) state, Tensor conv_weight, Tensor? conv_bias, "
    "Tensor A_log, Tensor D, Tensor dt_bias, int groups, Tensor? norm_weight, float eps, int group_size, str gate, "
    "str? activation, Tensor? addresses, str backend) -> Tensor",
    _run,
    _fake,
)
