"""One token through a multilayer perceptron and a mixture of experts, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mlp_step(
    x: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    router_weight: torch.Tensor | None,
    expert_in_weight: torch.Tensor | None,
    expert_out_weight: torch.Tensor | None,
    top_k: int,
    residual_scale: float | None,
) -> torch.Tensor:
    """RMSNorm, SwiGLU, the experts that the router chooses, and residual, one after the other.

    Args:
        x: (B, K).
        in_weight, out_weight: (2 I, K), gate above up, and (K, I).
        norm_weight: (K,), of the RMSNorm of x, or None for none.
        router_weight: (E, K), or None for no experts.
        expert_in_weight, expert_out_weight: (E, 2 J, K), gate above up, and (E, K, J), or None.
        top_k: experts of a row; their shares are the softmax of their logits.
        residual_scale: x + residual_scale times the output; None for the output alone.

    Returns:
        (B, K), in the dtype of x with a residual, else in that of the weights.
    """
    dtype = in_weight.dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    hidden = x
    if norm_weight is not None:
        hidden = F.rms_norm(x.to(wide), (x.shape[-1],), norm_weight.to(wide), norm_eps)
    hidden = hidden.to(dtype)
    gate, up = F.linear(hidden, in_weight).chunk(2, -1)
    y = F.linear(F.silu(gate) * up, out_weight)
    if router_weight is not None and expert_in_weight is not None and expert_out_weight is not None:
        logits = F.linear(hidden, router_weight).to(torch.promote_types(dtype, torch.float32))
        best, chosen = logits.topk(top_k)  # [B, top_k]
        shares = best.softmax(-1).to(dtype)
        for slot in range(top_k):
            experts = chosen[:, slot]
            gate, up = torch.einsum("bk,bjk->bj", hidden, expert_in_weight[experts]).chunk(2, -1)
            z = torch.einsum("bj,bkj->bk", F.silu(gate) * up, expert_out_weight[experts])
            y = y + z * shares[:, slot, None]
    return y if residual_scale is None else (x + y.to(torch.promote_types(dtype, x.dtype)) * residual_scale).to(x.dtype)
