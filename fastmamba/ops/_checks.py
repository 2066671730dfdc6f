"""Argument checks shared by the ops. Each error names the argument, what it was and what is allowed."""

from __future__ import annotations

from typing import Any

import torch

ACTIVATIONS = ("silu", "swish", None)
"""Convolution activations: "silu" and its other name "swish", or None for none."""

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FLOAT_DTYPES = (*_KERNEL_DTYPES, torch.float64)


def check_input(name: str, tensor: object, ndim: int, axes: str) -> None:
    """Check the leading tensor of an op: a non-empty floating tensor of `ndim` dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {type(tensor).__name__}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have shape {axes}, got {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if 0 in tensor.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)} for {axes}")


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int, ...],
    axes: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    floating: bool = True,
) -> None:
    """Check a further tensor against the shape, device and (where given) dtype that the leading one implies."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of shape {axes}, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {tensor.device}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must have dtype {dtype} like the other inputs, got {tensor.dtype}")
    if floating and tensor.dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_groups(name: str, groups: int, heads: int) -> None:
    """Check that the heads split evenly into groups."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: the number of groups must divide the {heads} heads, got {groups}")


def check_kernel_dtype(name: str, tensor: torch.Tensor) -> None:
    """Check that the Triton kernels take this dtype."""
    if tensor.dtype not in _KERNEL_DTYPES:
        raise ValueError(f"{name}: backend='triton' takes float16, bfloat16 and float32, got {tensor.dtype}")


def check_dtype(name: str, dtype: object) -> None:
    """Check a dtype argument: a floating one, or None."""
    if dtype is not None and dtype not in _FLOAT_DTYPES:
        raise ValueError(f"{name} must be a floating torch dtype or None, got {dtype!r}")


def check_activation(activation: object) -> None:
    """Check a convolution's activation name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")


def check_dt_limit(dt_limit: Any) -> None:
    """Check a pair of bounds of dt."""
    try:
        low, high = (float(bound) for bound in dt_limit)
    except (TypeError, ValueError):
        raise ValueError(f"dt_limit must be a pair of numbers (low, high), got {dt_limit!r}") from None
    if not low <= high:  # NaN fails too
        raise ValueError(f"dt_limit must be (low, high) with low <= high and no NaN, got {dt_limit!r}")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record the call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_MOST_FORMS = 4096


class Forms:
    """Forms of calls that passed an op's checks. Not a plain set: torch.compile would guard on what is in it."""

    def __init__(self) -> None:
        self.passed: set[Any] = set()


def seen_form(forms: Forms, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """The fast way past an op's checks: has a call of this form passed them before?

    All that the checks look at are shapes, dtypes, devices and options, so a call that agrees in these with one that
    passed will pass. This takes 2 to 3 us, the checks up to 20.

        form = seen_form(_forms, (x, weight, bias), (activation,))
        if form is not True:
            check_everything(...)
            remember_form(_forms, form)

    Returns:
        True if so; else what `remember_form` takes once the checks have passed.
    """
    if torch.compiler.is_compiling():
        return None  # sizes may be symbols, and a trace checks once anyway
    try:
        form = (*[None if t is None else (t.shape, t.dtype, t.device) for t in tensors], *options)
        return form in forms.passed or form
    except (AttributeError, TypeError):  # no tensor, or nothing that can be hashed: the checks say what is wrong
        return None


def remember_form(forms: Forms, form: Any) -> None:
    """Remember what `seen_form` returned, after the checks have passed."""
    if form is not None:
        if len(forms.passed) >= _MOST_FORMS:
            forms.passed.clear()
        forms.passed.add(form)
