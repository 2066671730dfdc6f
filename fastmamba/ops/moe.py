"""A mixture of SwiGLU experts (Shazeer et al., 2017; Shazeer, 2020) on many tokens."""

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
from fastmamba.reference.moe import moe as reference


def moe(
    x: Tensor,
    router_weight: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    *,
    top_k: int,
    add: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The experts that a router chooses for each token, in six launches for 32K tokens; none waits for the host.

        y = sum_e share_e out_weight[e] (silu(in_weight[e, :J] x) * in_weight[e, J:] x)  (+ add)

    over the top_k experts e with the largest logits router_weight x; the shares are the softmax of those. Logits are
    rounded to the dtype of x, and of equal ones the lower expert's counts more. Sums are in float32; what is rounded is
    the product of gate and up, each expert's output times its share, y, and the sum with `add`.

    Args:
        x: (B, T, K), float16, bfloat16 or float32 (float64 too on the torch backend). Any strides.
        router_weight: (E, K), dtype of x.
        in_weight: (E, 2 J, K), the gate's rows above the others, dtype of x.
        out_weight: (E, K, J), dtype of x.
        top_k: experts of a token, 1 to E.
        add: (B, T, K), dtype of x, added to the result; None for nothing.
        backend: "auto", "triton" or "torch". Triton takes contiguous weights only.

    Returns:
        (B, T, K), contiguous, in the dtype of x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an empty input.
        RuntimeError: backend="triton" where it cannot run.
    """
    tensors, kind = (x, router_weight, in_weight, out_weight, add), (top_k, backend)
    found = _repeats.again(tensors, kind)
    if found is not None:
        return found
    form = seen_form(_forms, tensors, (top_k,))
    if form is not True:
        _check(*tensors, top_k)
        remember_form(_forms, form)
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        check_kernel_dtype("x", x)
        for name, weight in (("router_weight", router_weight), ("in_weight", in_weight), ("out_weight", out_weight)):
            if not weight.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {weight.stride()}")
    if needs_grad(*tensors):
        return reference(x, router_weight, in_weight, out_weight, top_k, add)
    arguments = (x, router_weight, in_weight, out_weight, top_k, add, backend)
    if torch.compiler.is_compiling():
        return torch.ops.fastmamba.moe(*arguments)
    return _repeats.run(tensors, kind, _run, *arguments)


_forms = Forms()
_repeats = Repeats()


def _check(x: Any, router_weight: Any, in_weight: Any, out_weight: Any, add: Any, top_k: Any) -> None:
    check_input("x", x, 3, "(B, T, K)")
    size, device, dtype = x.shape[2], x.device, x.dtype
    check_input("router_weight", router_weight, 2, "(E, K)")
    experts = router_weight.shape[0]
    check_tensor("router_weight", router_weight, (experts, size), "(E, K)", device, dtype)
    check_input("out_weight", out_weight, 3, "(E, K, J)")
    width = out_weight.shape[2]
    check_tensor("out_weight", out_weight, (experts, size, width), "(E, K, J)", device, dtype)
    check_tensor("in_weight", in_weight, (experts, 2 * width, size), "(E, 2 J, K)", device, dtype)
    if add is not None:
        check_tensor("add", add, tuple(x.shape), "(B, T, K)", device, dtype)
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be from 1 to the {experts} experts, got {top_k!r}")


@functools.cache
def _kernel() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels.moe import moe

    return moe


def _run(
    x: Tensor,
    router_weight: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    top_k: int,
    add: Tensor | None,
    backend: str,
) -> Tensor:
    run = _kernel() if backend == "triton" else reference
    return run(x, router_weight, in_weight, out_weight, top_k, add)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


register(
    "moe(Tensor x, Tensor router_weight, Tensor in_weight, Tensor out_weight, int top_k, Tensor? add, str backend) "
    "-> Tensor",
    _run,
    _fake,
)
