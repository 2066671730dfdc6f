"""The gate of a SwiGLU multilayer perceptron, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :I]) x[..., I:]`` of x (..., 2 I), in the dtype of x. Differentiable."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
