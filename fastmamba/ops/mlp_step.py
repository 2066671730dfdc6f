"""One token through a SwiGLU multilayer perceptron (Shazeer, 2020) and a mixture of experts, for small batches."""

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
from fastmamba.ops._dispatch import overlaps, resolve_backend
from fastmamba.ops._library import register
from fastmamba.reference.mlp_step import mlp_step as reference_step


def mlp_step(
    x: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    router_weight: Tensor | None = None,
    expert_in_weight: Tensor | None = None,
    expert_out_weight: Tensor | None = None,
    top_k: int = 0,
    residual_scale: float | None = None,
    counter: Tensor | None = None,
    overlap: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Norm, SwiGLU, experts and residual of one token, in two launches, or in three with experts.

        v = norm_weight x / sqrt(mean(x^2) + norm_eps);  swiglu(W, U) = U (silu(W[:I] v) * W[I:] v)
        out = x + residual_scale (swiglu(in_weight, out_weight) + sum_e share_e swiglu(expert_in_e, expert_out_e))

    over the top_k experts e with the largest logits router_weight v; the shares are the softmax of those. Products and
    sums are in float32, rounded at the end. Any batch size is right; on a GPU it is fast for few rows: weights are
    read once a row.

    Args:
        x: (B, K), floating, contiguous channels; the residual stream, which may be wider than the weights.
        in_weight: (2 I, K), the gate's rows above the others, float16, bfloat16 or float32 (float64 too on the torch
            backend).
        out_weight: (K, I), dtype of in_weight.
        norm_weight: (K,), of the RMSNorm of x; None for none.
        norm_eps: 0 or more.
        router_weight: (E, K), dtype of in_weight; None for no experts.
        expert_in_weight: (E, 2 J, K), dtype of in_weight. With a router, and only then.
        expert_out_weight: (E, K, J), dtype of in_weight. With a router, and only then.
        top_k: experts of a row, 1 to E with a router and 0 without.
        residual_scale: what multiplies the output before x is added; None returns it as it is.
        counter: (B,), int32 zeros on x's device, left zero, which no other call uses at the same time: what the choice
            of experts needs. None for ours, which a captured CUDA graph has to fill at every replay.
        overlap: as in `layer_step`. The kernel enqueued just before must not write any of the weights.
        backend: "auto", "triton" or "torch". Triton takes contiguous weights only.

    Returns:
        (B, K), contiguous, in the dtype of x with a residual, else in that of in_weight.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run, or gradients are needed: there is no backward.
    """
    weights = (in_weight, out_weight, router_weight, expert_in_weight, expert_out_weight)
    tensors = (x, *weights, norm_weight)
    form = seen_form(_forms, tensors, (norm_eps, top_k, residual_scale))
    if form is not True:
        _check(*tensors, norm_eps, top_k, residual_scale)
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("in_weight", in_weight)
        if x.stride(1) != 1:
            raise ValueError(f"x must have contiguous rows, got strides {x.stride()}")
        for name, weight in zip(_WEIGHTS, weights, strict=True):
            if weight is not None and not weight.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {weight.stride()}")
    if counter is not None and (
        counter.shape[0] < x.shape[0] or counter.dtype != torch.int32 or counter.is_cpu != x.is_cpu
    ):
        raise ValueError(f"counter must be {x.shape[0]} or more int32 zeros beside x")
    if needs_grad(*tensors):
        raise RuntimeError("mlp_step has no backward: call it under torch.no_grad()")
    run = torch.ops.fastmamba.mlp_step if torch.compiler.is_compiling() else _run
    options = (norm_weight, norm_eps, router_weight, expert_in_weight, expert_out_weight, top_k, residual_scale)
    return run(x, in_weight, out_weight, *options, counter, overlap, backend)


_WEIGHTS = ("in_weight", "out_weight", "router_weight", "expert_in_weight", "expert_out_weight")
_forms = Forms()


def _check(
    x: Any,
    in_weight: Any,
    out_weight: Any,
    router_weight: Any,
    expert_in_weight: Any,
    expert_out_weight: Any,
    norm_weight: Any,
    norm_eps: Any,
    top_k: Any,
    residual_scale: Any,
) -> None:
    check_input("x", x, 2, "(B, K)")
    size, device = x.shape[1], x.device
    check_tensor("x", x, tuple(x.shape), "(B, K)", device)
    check_input("out_weight", out_weight, 2, "(K, I)")
    inner = out_weight.shape[1]
    check_tensor("in_weight", in_weight, (2 * inner, size), "(2 I, K)", device)
    dtype = in_weight.dtype
    check_tensor("out_weight", out_weight, (size, inner), "(K, I)", device, dtype)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, (size,), "(K,)", device)
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps must be 0 or more, got {norm_eps!r}")
    if not isinstance(residual_scale, int | float | None):
        raise TypeError(f"residual_scale must be a number or None, got {type(residual_scale).__name__}")
    if router_weight is None:
        for name, weight in (("expert_in_weight", expert_in_weight), ("expert_out_weight", expert_out_weight)):
            if weight is not None:
                raise ValueError(f"{name} needs a router_weight")
        if top_k != 0:
            raise ValueError(f"top_k must be 0 without a router_weight, got {top_k!r}")
        return
    check_input("router_weight", router_weight, 2, "(E, K)")
    experts = router_weight.shape[0]
    check_tensor("router_weight", router_weight, (experts, size), "(E, K)", device, dtype)
    check_input("expert_out_weight", expert_out_weight, 3, "(E, K, J)")
    expert = expert_out_weight.shape[2]
    check_tensor("expert_out_weight", expert_out_weight, (experts, size, expert), "(E, K, J)", device, dtype)
    check_tensor("expert_in_weight", expert_in_weight, (experts, 2 * expert, size), "(E, 2 J, K)", device, dtype)
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be from 1 to the {experts} experts, got {top_k!r}")


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.mlp_step import mlp_step

    return mlp_step


def _run(
    x: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    router_weight: Tensor | None,
    expert_in_weight: Tensor | None,
    expert_out_weight: Tensor | None,
    top_k: int,
    residual_scale: float | None,
    counter: Tensor | None,
    overlap: bool,
    backend: str,
) -> Tensor:
    experts = (router_weight, expert_in_weight, expert_out_weight, top_k)
    arguments = (x, in_weight, out_weight, norm_weight, norm_eps, *experts, residual_scale)
    if backend == "triton":
        return _kernel()(*arguments, counter, overlap and overlaps(x.device))
    return reference_step(*arguments)


def _fake(x: Tensor, in_weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=in_weight.dtype if rest[7] is None else x.dtype)


register(
    "mlp_step(Tensor x, Tensor in_weight, Tensor out_weight, Tensor? norm_weight, float norm_eps, "
    "Tensor? router_weight, Tensor? expert_in_weight, Tensor? expert_out_weight, int top_k, float? residual_scale, "
    "Tensor? counter, bool overlap, str backend) -> Tensor",
    _run,
    _fake,
)
