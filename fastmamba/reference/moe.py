"""A mixture of SwiGLU experts, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def moe(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    in_weight: torch.Tensor,
    out_weight: torch.Tensor,
    top_k: int,
    add: torch.Tensor | None,
) -> torch.Tensor:
    """Each expert on the tokens that chose it, one after the other.

    Args:
        x: (B, T, K).
        router_weight: (E, K).
        in_weight, out_weight: (E, 2 J, K), gate above up, and (E, K, J).
        top_k: experts of a token; their shares are the softmax of their logits.
        add: (B, T, K), added to the result, or None.

    Returns:
        (B, T, K), in the dtype of x.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = F.linear(tokens, router_weight).to(torch.promote_types(x.dtype, torch.float32))
    best, chosen = logits.topk(top_k, dim=-1)  # [B T, top_k]
    shares = best.softmax(-1).to(x.dtype)
    slots = tokens.new_empty((len(tokens), top_k, x.shape[-1]))
    for expert in range(len(router_weight)):
        token, slot = torch.where(chosen == expert)
        gate, up = F.linear(tokens[token], in_weight[expert]).chunk(2, -1)
        slots[token, slot] = F.linear(F.silu(gate) * up, out_weight[expert]) * shares[token, slot, None]
    y = slots.sum(1).view(x.shape)
    return y if add is None else y + add
