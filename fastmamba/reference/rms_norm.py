"""RMSNorm and the residual add before it, in plain PyTorch."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """``weight norm(x)``, with x and norm(x) rounded to ``dtype`` and all else in float32. Differentiable.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        dtype: what x is rounded to before the norm, and norm(x) after it.

    Returns:
        y (..., D) in the promotion of ``dtype`` with the dtype of weight.
    """
    u = x.to(dtype).to(torch.promote_types(dtype, torch.float32))
    u = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)
    return weight * u.to(dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    factor: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s = residual + factor x`` in ``sum_dtype``, and ``rms_norm(s)``. Differentiable.

    Returns:
        (y, s).
    """
    total = residual.to(sum_dtype) + (x if factor == 1.0 else x * factor)
    total = total.to(sum_dtype)
    return rms_norm(total, weight, eps, dtype), total
