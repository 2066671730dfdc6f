"""One token through the middle of a Mamba-2 mixer, in plain PyTorch."""

from __future__ import annotations

import torch

from ._common import compute_dtype_of
from .causal_conv1d import causal_conv1d_update
from .gated_rms_norm import gated_rms_norm
from .ssd_step import ssd_step


def mixer_step(
    projected: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    groups: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    group_size: int,
    gate: str,
    activation: str | None,
) -> torch.Tensor:
    """The convolution's step, the recurrence's step and the gated norm, one after the other; the states in place.

    Args:
        projected: (B, 2*D + 2*G*N + H).
        conv_state: (B, D + 2*G*N, S).
        state: (B, H, P, N).
        conv_weight: (D + 2*G*N, W).
        conv_bias: (D + 2*G*N,) or None.
        A_log, D, dt_bias: (H,).
        norm_weight: (D,), or None for no norm.
        gate: "before" or "after" the norm, or "none".

    Returns:
        (B, D) in projected.dtype.
    """
    batch, heads, head_dim, width = state.shape
    inner = heads * head_dim
    z, conv_in, dt = projected.split((inner, conv_state.shape[1], heads), dim=-1)
    conv_out = causal_conv1d_update(conv_in, conv_state, conv_weight, conv_bias, activation)
    x, B, C = conv_out.split((inner, groups * width, groups * width), dim=-1)
    x, B, C = x.view(batch, heads, head_dim), B.view(batch, groups, width), C.view(batch, groups, width)
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    gated = gate != "none" and norm_weight is None
    z_ = z.view(batch, heads, head_dim) if gated else None
    wide = None if norm_weight is None else compute_dtype_of(x, state)  # float16 may not hold what the norm takes
    y = ssd_step(state, x, dt, A, B, C, D, z_, dt_bias, True, wide)
    y = y.view(batch, 1, inner)
    if norm_weight is not None:
        y = gated_rms_norm(y, norm_weight, z[:, None], eps, group_size, gate == "after")
    return y.view(batch, inner).to(projected.dtype)
