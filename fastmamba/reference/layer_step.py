"""One token through a whole Mamba-2 layer, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .mixer_step import mixer_step


def layer_step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    in_weight: torch.Tensor,
    in_bias: torch.Tensor | None,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    out_weight: torch.Tensor,
    out_bias: torch.Tensor | None,
    groups: int,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    gate_weight: torch.Tensor | None,
    gate_eps: float,
    residual_scale: float | None,
    activation: str | None,
) -> torch.Tensor:
    """RMSNorm, projection, `mixer_step`, projection and residual, one after the other; the states in place.

    Args:
        x: (B, K).
        conv_state: (B, D + 2*G*N, S).
        state: (B, H, P, N).
        in_weight, in_bias: (2*D + 2*G*N + H, K), (2*D + 2*G*N + H,) or None.
        conv_weight, conv_bias: (D + 2*G*N, W), (D + 2*G*N,) or None.
        A_log, D, dt_bias: (H,).
        out_weight, out_bias: (K, D), (K,) or None.
        norm_weight: (K,), of the RMSNorm of x, or None for none.
        gate_weight: (D,), of the gated RMSNorm, or None for a gate alone.
        residual_scale: x + residual_scale times the layer's output; None for the output alone.

    Returns:
        (B, K), in the dtype of x with a residual, else in that of the weights.
    """
    dtype = in_weight.dtype
    hidden = x
    if norm_weight is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        hidden = F.rms_norm(x.to(wide), (x.shape[-1],), norm_weight.to(wide), norm_eps)
    projected = F.linear(hidden.to(dtype), in_weight, in_bias)
    inner = state.shape[1] * state.shape[2]
    y = mixer_step(
        *(projected, conv_state, state, conv_weight, conv_bias, A_log, D, dt_bias, groups),
        *(gate_weight, gate_eps, inner, "before", activation),
    )
    y = F.linear(y, out_weight, out_bias)
    return y if residual_scale is None else (x + y.to(torch.promote_types(dtype, x.dtype)) * residual_scale).to(x.dtype)
