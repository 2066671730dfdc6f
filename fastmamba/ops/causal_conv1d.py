"""Depthwise causal convolution over tokens, and its one-token step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmamba.ops._checks import (
    Forms,
    check_activation,
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
from fastmamba.reference.causal_conv1d import causal_conv1d as reference_conv
from fastmamba.reference.causal_conv1d import causal_conv1d_update as reference_update


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_states: Tensor | None = None,
    mask: Tensor | None = None,
    final_states: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution, token-major, with the activation in the same pass.

        y[b, t, c] = mask[b, t] * act(bias[c] + sum_k weight[c, k] * x[b, t - (W - 1) + k, c])

    where positions before the sequence are read from `initial_states`, or are zero. Arithmetic is in float32.

    Args:
        x: (B, T, C), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides: no copy is made.
        weight: (C, W), any floating dtype.
        bias: (C,).
        initial_states: (B, C, W - 1), the inputs before the first token, oldest first. Any strides.
        mask: (B, T), multiplies the output.
        final_states: (B, C, S), any floating dtype and strides; it is overwritten with the last S inputs, oldest first,
            zeros where there are fewer (those in `initial_states` count). It shares no memory with the other tensors.
        activation: "silu", its other name "swish", or None.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, T, C), contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or autograd would have to see `final_states` change.
    """
    tensors, kind = (x, weight, bias, initial_states, mask, final_states), (activation, backend)
    found = _repeats.again(tensors, kind)
    if found is not None:
        return found
    form = seen_form(_forms, tensors, (activation,))
    if form is not True:
        _check(x, weight, bias, initial_states, mask, final_states, activation)
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if final_states is not None and needs_grad(x, initial_states, final_states):
        raise RuntimeError("causal_conv1d overwrites final_states, which autograd cannot record: leave it out")
    if needs_grad(x, weight, bias, initial_states, mask):
        return reference_conv(x, weight, bias, initial_states, mask, activation, final_states)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.causal_conv1d(*tensors, activation, backend)
    return _repeats.run(tensors, kind, run, *tensors, activation, backend)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """One token of `causal_conv1d`; `conv_state` is shifted left by one and takes the new input, in place.

    Args:
        x: (B, C), the new token's inputs. Any strides.
        conv_state: (B, C, S) with S >= W - 1, the inputs before it, oldest first, any floating dtype. Changed in place.
        weight: (C, W).
        bias: (C,).
        activation: "silu", its other name "swish", or None.
        backend: "auto", "triton" or "torch".

    Returns:
        (B, C), contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or autograd would have to see the in-place change.
    """
    form = seen_form(_forms, (x, conv_state, weight, bias), (activation,))
    if form is not True:
        _check_update(x, conv_state, weight, bias, activation)
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
    if needs_grad(conv_state):
        raise RuntimeError("causal_conv1d_update changes conv_state in place, which must not require gradients")
    if needs_grad(x, weight, bias):
        return reference_update(x, conv_state, weight, bias, activation)
    execute = torch.ops.fastmamba.causal_conv1d_update if torch.compiler.is_compiling() else _run_update
    return execute(x, conv_state, weight, bias, activation, backend)


# Forms of calls that passed the checks; the two ops differ in the dimensions of x.
_forms = Forms()
_repeats = Repeats()


def _check(x: Any, weight: Any, bias: Any, initial_states: Any, mask: Any, final_states: Any, activation: Any) -> None:
    check_input("x", x, 3, "(B, T, C)")
    batch, tokens, channels = x.shape
    device = x.device
    check_input("weight", weight, 2, "(C, W)")
    width = weight.shape[1]
    check_tensor("weight", weight, (channels, width), "(C, W)", device)
    if bias is not None:
        check_tensor("bias", bias, (channels,), "(C,)", device)
    if initial_states is not None:
        check_tensor("initial_states", initial_states, (batch, channels, width - 1), "(B, C, W - 1)", device)
    if mask is not None:
        check_tensor("mask", mask, (batch, tokens), "(B, T)", device, floating=False)
    if final_states is not None:
        check_input("final_states", final_states, 3, "(B, C, S)")
        check_tensor("final_states", final_states, (batch, channels, final_states.shape[2]), "(B, C, S)", device)
    check_activation(activation)


def _check_update(x: Any, conv_state: Any, weight: Any, bias: Any, activation: Any) -> None:
    check_input("x", x, 2, "(B, C)")
    batch, channels = x.shape
    device = x.device
    check_input("weight", weight, 2, "(C, W)")
    width = weight.shape[1]
    check_tensor("weight", weight, (channels, width), "(C, W)", device)
    check_input("conv_state", conv_state, 3, "(B, C, S)")
    check_tensor("conv_state", conv_state, (batch, channels, conv_state.shape[2]), "(B, C, S)", device)
    if conv_state.shape[2] < width - 1:
        raise ValueError(f"conv_state must hold at least W - 1 = {width - 1} inputs, got {conv_state.shape[2]}")
    if bias is not None:
        check_tensor("bias", bias, (channels,), "(C,)", device)
    check_activation(activation)


@functools.cache
def _kernels() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels import causal_conv1d

    return causal_conv1d


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    mask: Tensor | None,
    final_states: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor:
    if backend == "triton":
        return _kernels().causal_conv1d(x, weight, bias, initial_states, mask, final_states, activation)
    return reference_conv(x, weight, bias, initial_states, mask, activation, final_states)


def _run_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
) -> Tensor:
    if backend == "triton":
        return _kernels().causal_conv1d_update(x, conv_state, weight, bias, activation)
    return reference_update(x, conv_state, weight, bias, activation)


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? mask, "
    "Tensor(a!)? final_states, str? activation, str backend) -> Tensor",
    run,
    _fake,
)
register(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, str? activation, str backend) "
    "-> Tensor",
    _run_update,
    _fake,
)
