"""One token through a whole Mamba-2 layer, for generation in batches of one."""

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
from fastmamba.ops._dispatch import overlaps, resolve_backend
from fastmamba.ops._library import register
from fastmamba.reference.layer_step import layer_step as reference_step

MOST_ROWS = 1
"""The largest batch for which this is the fast way: it reads the weights once a row, matrix products once a batch."""


def layer_step(
    x: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    groups: int = 1,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    gate_weight: Tensor | None = None,
    gate_eps: float = 1e-6,
    residual_scale: float | None = None,
    activation: str | None = "silu",
    addresses: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A Mamba-2 layer on one token: norm, input projection, `mixer_step`, output projection, residual. Three launches.

        v = norm_weight x / sqrt(mean(x^2) + norm_eps);  projected = in_weight v + in_bias
        out = x + residual_scale (out_weight mixer_step(projected) + out_bias)

    Both states are changed in place. Products and sums are in float32; rounding is where the states need it, and at the
    end. Any batch size is right; on a GPU it is fast up to `MOST_ROWS`.

    Args:
        x: (B, K), floating, contiguous channels; the residual stream, which may be wider than the weights.
        conv_state: (B, D + 2*G*N, S) with S >= W - 1, the inputs of the convolution before this one, oldest first.
        state: (B, H, P, N), any floating dtype.
        in_weight: (2*D + 2*G*N + H, K), contiguous rows, float16, bfloat16 or float32 (float64 too on the torch
            backend); its rows: z (D) | x (D) | B (G*N) | C (G*N) | dt (H), with D = H*P.
        in_bias: (2*D + 2*G*N + H,).
        conv_weight, conv_bias: (D + 2*G*N, W), (D + 2*G*N,).
        A_log, D, dt_bias: (H,).
        out_weight: (K, D), dtype of in_weight, contiguous rows.
        out_bias: (K,).
        groups: G, a divisor of H.
        norm_weight: (K,), of the RMSNorm of x; None for none.
        norm_eps: 0 or more.
        gate_weight: (D,), of the gated RMSNorm over all of D, the gate before the norm; None for the gate alone.
        gate_eps: 0 or more.
        residual_scale: what multiplies the layer's output before x is added; None returns it as it is.
        activation: of the convolution: "silu", its other name "swish", or None.
        addresses: (2,) int64, as in `mixer_step`. Triton only.
        overlap: let each kernel start while the one before it ends, and load its weights meanwhile (programmatic
            dependent launch, from compute capability 9.0; no difference elsewhere). The kernel enqueued just before
            must not write any of the weights.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, K), contiguous, in the dtype of x with a residual, else in that of in_weight.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or gradients are needed: there is no backward.
    """
    tensors = (
        *(x, conv_state, state, in_weight, in_bias, conv_weight, conv_bias, A_log, D, dt_bias, out_weight, out_bias),
        *(norm_weight, gate_weight, addresses),
    )
    form = seen_form(_forms, tensors, (groups, norm_eps, gate_eps, residual_scale, activation))
    if form is not True:
        _check(*tensors, groups, norm_eps, gate_eps, residual_scale, activation)
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("in_weight", in_weight)
        for name, tensor in (("x", x), ("in_weight", in_weight), ("out_weight", out_weight)):
            if tensor.stride(1) != 1:
                raise ValueError(f"{name} must have contiguous rows, got strides {tensor.stride()}")
    elif addresses is not None:
        raise ValueError("addresses needs backend='triton'")
    if needs_grad(*tensors):
        raise RuntimeError("layer_step has no backward: call it under torch.no_grad()")
    run = torch.ops.fastmamba.layer_step if torch.compiler.is_compiling() else _run
    return run(
        *tensors[:12],
        *(groups, norm_weight, norm_eps, gate_weight, gate_eps, residual_scale, activation, addresses, overlap),
        backend,
    )


_forms = Forms()


def _check(
    x: Any,
    conv_state: Any,
    state: Any,
    in_weight: Any,
    in_bias: Any,
    conv_weight: Any,
    conv_bias: Any,
    A_log: Any,
    D: Any,
    dt_bias: Any,
    out_weight: Any,
    out_bias: Any,
    norm_weight: Any,
    gate_weight: Any,
    addresses: Any,
    groups: Any,
    norm_eps: Any,
    gate_eps: Any,
    residual_scale: Any,
    activation: Any,
) -> None:
    check_input("x", x, 2, "(B, K)")
    check_input("state", state, 4, "(B, H, P, N)")
    batch, heads, head_dim, width = state.shape
    size, inner, device = x.shape[1], heads * head_dim, x.device
    if groups < 1:
        raise ValueError(f"groups must be 1 or more, got {groups}")
    check_groups("groups", groups, heads)
    channels = inner + 2 * groups * width
    entries = inner + channels + heads
    check_tensor("x", x, (batch, size), "(B, K)", device)
    check_tensor("state", state, (batch, heads, head_dim, width), "(B, H, P, N)", device)
    check_tensor("in_weight", in_weight, (entries, size), "(2*D + 2*G*N + H, K)", device)
    check_tensor("out_weight", out_weight, (size, inner), "(K, D)", device, in_weight.dtype)
    check_input("conv_weight", conv_weight, 2, "(D + 2*G*N, W)")
    taps = conv_weight.shape[1]
    check_tensor("conv_weight", conv_weight, (channels, taps), "(D + 2*G*N, W)", device)
    check_input("conv_state", conv_state, 3, "(B, D + 2*G*N, S)")
    check_tensor("conv_state", conv_state, (batch, channels, conv_state.shape[2]), "(B, D + 2*G*N, S)", device)
    if conv_state.shape[2] < taps - 1:
        raise ValueError(f"conv_state must hold at least W - 1 = {taps - 1} inputs, got {conv_state.shape[2]}")
    for name, tensor, length, axes in (
        ("in_bias", in_bias, entries, "(2*D + 2*G*N + H,)"),
        ("conv_bias", conv_bias, channels, "(D + 2*G*N,)"),
        ("out_bias", out_bias, size, "(K,)"),
        ("norm_weight", norm_weight, size, "(K,)"),
        ("gate_weight", gate_weight, inner, "(D,)"),
    ):
        if tensor is not None:
            check_tensor(name, tensor, (length,), axes, device)
    for name, tensor in (("A_log", A_log), ("D", D), ("dt_bias", dt_bias)):
        check_tensor(name, tensor, (heads,), "(H,)", device)
    for name, eps in (("norm_eps", norm_eps), ("gate_eps", gate_eps)):
        if not eps >= 0:
            raise ValueError(f"{name} must be 0 or more, got {eps!r}")
    if not isinstance(residual_scale, int | float | None):
        raise TypeError(f"residual_scale must be a number or None, got {type(residual_scale).__name__}")
    check_activation(activation)
    if addresses is not None:
        check_tensor("addresses", addresses, (2,), "(2,)", device, torch.int64, floating=False)


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.layer_step import layer_step

    return layer_step


def _run(
    x: Tensor,
    conv_state: Tensor,
    state: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    groups: int,
    norm_weight: Tensor | None,
    norm_eps: float,
    gate_weight: Tensor | None,
    gate_eps: float,
    residual_scale: float | None,
    activation: str | None,
    addresses: Tensor | None,
    overlap: bool,
    backend: str,
) -> Tensor:
    weights = (in_weight, in_bias, conv_weight, conv_bias, A_log, D, dt_bias, out_weight, out_bias)
    options = (groups, norm_weight, norm_eps, gate_weight, gate_eps, residual_scale, activation)
    if backend == "triton":
        overlap = overlap and overlaps(x.device)
        return _kernel()(x, conv_state, state, *weights, *options, addresses, overlap)
    return reference_step(x, conv_state, state, *weights, *options)


def _fake(x: Tensor, conv_state: Tensor, state: Tensor, in_weight: Tensor, *rest: Any) -> Tensor:
    dtype = in_weight.dtype if rest[13] is None else x.dtype
    return x.new_empty(x.shape, dtype=dtype)


register(
    "layer_step(Tensor x, Tensor(a!) conv_state, Tensor(b!) state, Tensor in_weight, Tensor? in_bias, "
    "Tensor conv_weight, Tensor? conv_bias, Tensor A_log, Tensor D, Tensor dt_bias, Tensor out_weight, "
    "Tensor? out_bias, int groups, Tensor? norm_weight, float norm_eps, Tensor? gate_weight, float gate_eps, "
    "float? residual_scale, str? activation, Tensor? addresses, bool overlap, str backend) -> Tensor",
    _run,
    _fake,
)
