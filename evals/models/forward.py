"""A differentiable forward of the two small models, on the modules of transformers' own models.

transformers' scan is too slow to train with where mamba_ssm is not installed. This one takes the sequence in chunks and
does all sums with matrix products (Dao and Gu, "Transformers are SSMs", section 6). It computes what transformers
computes: tests/evals/test_training.py holds the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Selective state space scan: x (B, T, H, P), dt (B, T, H), A (H,), B and C (B, T, N), T a multiple of CHUNK."""
    batch, tokens, heads, _ = x.shape
    dtype = x.dtype
    size = min(CHUNK, tokens)
    decay = (dt * A).view(batch, -1, size, heads).permute(0, 3, 1, 2)  # [B, H, K, Q]
    cum = decay.cumsum(-1)
    within = cum[..., :, None] - cum[..., None, :]  # [B, H, K, Q, Q]
    within = within.masked_fill(_above(size, x.device), float("-inf")).exp().to(dtype)
    x = (x * dt[..., None].to(dtype)).view(batch, -1, size, *x.shape[2:]).permute(0, 3, 1, 2, 4)  # [B, H, K, Q, P]
    b, c = (tensor.view(batch, 1, -1, size, tensor.shape[-1]) for tensor in (B, C))  # [B, 1, K, Q, N]
    y = (within * (c @ b.mT)) @ x

    left = (
        x * (cum[..., -1:] - cum).exp().to(dtype)[..., None]
    ).mT @ b  # [B, H, K, P, N], added to the state by a chunk
    total = F.pad(cum[..., -1], (1, 0)).cumsum(-1)  # [B, H, K + 1]
    between = (total[..., :-1, None] - total[..., None, 1:]).masked_fill(
        _above(total.shape[-1] - 1, x.device, 0), float("-inf")
    )
    before = between.exp().to(dtype) @ left.flatten(3)  # [B, H, K, P * N], the state before each chunk
    y = y + (c @ before.view(left.shape).mT) * cum.exp().to(dtype)[..., None]
    return y.permute(0, 2, 3, 1, 4).reshape(batch, tokens, heads, -1)


def _above(size: int, device: torch.device, diagonal: int = 1) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(diagonal)


def mixer(module: Any, hidden: Tensor) -> Tensor:
    """A Mamba-2 mixer with one group, without cache or mask."""
    inner, state, width = module.intermediate_size, module.ssm_state_size, module.conv_kernel_size
    z, conv_in, dt = F.linear(hidden, module.in_proj.weight).split((inner, module.conv_dim, module.num_heads), dim=-1)
    # Shifted products: the depthwise convolution's backward is slow.
    padded = F.pad(conv_in, (0, 0, width - 1, 0))
    weight = module.conv1d.weight.squeeze(1).to(conv_in.dtype)
    conv = module.conv1d.bias.to(conv_in.dtype)
    for shift in range(width):
        conv = torch.addcmul(conv, padded[:, shift : shift + conv_in.shape[1]], weight[:, shift])
    x, B, C = F.silu(conv).split((inner, state, state), dim=-1)
    x = x.reshape(*x.shape[:2], module.num_heads, module.head_dim)
    y = ssd(x, F.softplus(dt.float() + module.dt_bias), -module.A_log.exp(), B, C)
    y = (y + x * module.D.to(x.dtype)[:, None]).flatten(2)
    y = F.rms_norm(y * F.silu(z), (inner,), eps=module.norm.variance_epsilon) * module.norm.weight
    return F.linear(y, module.out_proj.weight)


def attention(module: Any, hidden: Tensor) -> Tensor:
    query, key, value = (
        F.linear(hidden, layer.weight).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=module.scaling, enable_gqa=True)
    return F.linear(out.transpose(1, 2).flatten(2), module.o_proj.weight)


def experts(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert on every token, weighted: with four of them cheaper than sorting. Also the load-balancing loss."""
    logits = F.linear(hidden, module.router.weight).float()
    top, index = logits.topk(module.router.top_k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, index, top.softmax(-1))  # [B, T, E]
    load = (weights > 0).float().mean((0, 1)) * logits.softmax(-1).mean((0, 1))
    up = torch.einsum("btd,eid->btei", hidden, module.experts.gate_up_proj)
    gate, up = up.chunk(2, dim=-1)
    inner = F.silu(gate) * up * weights[..., None].to(up.dtype)
    out = torch.einsum("btei,edi->btd", inner, module.experts.down_proj)
    return out, load.sum() * logits.shape[-1]


def shared(module: Any, hidden: Tensor) -> Tensor:
    gate, up = F.linear(hidden, module.input_linear.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, module.output_linear.weight)


def norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, (hidden.shape[-1],), eps=module.variance_epsilon) * module.weight


def forward(model: Any, ids: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the load-balancing loss (0 without experts) of tokens (B, T)."""

    def drop(hidden: Tensor) -> Tensor:
        return F.dropout(hidden, dropout, training=dropout > 0)

    balance = torch.zeros((), device=ids.device)
    if hasattr(model, "backbone"):  # Mamba2
        hidden = drop(F.embedding(ids, model.backbone.embeddings.weight))
        for layer in model.backbone.layers:
            hidden = hidden + drop(mixer(layer.mixer, norm(layer.norm, hidden)))
        hidden = norm(model.backbone.norm_f, hidden)
        return F.linear(hidden, model.lm_head.weight), balance
    scale = model.config.residual_multiplier
    hidden = drop(F.embedding(ids, model.model.embed_tokens.weight)) * model.config.embedding_multiplier
    for layer in model.model.layers:
        inner = norm(layer.input_layernorm, hidden)
        inner = mixer(layer.mamba, inner) if layer.mamba is not None else attention(layer.self_attn, inner)
        hidden = hidden + drop(inner) * scale
        inner = norm(layer.post_attention_layernorm, hidden)
        sparse, loss = experts(layer.block_sparse_moe, inner)
        balance = balance + loss
        hidden = hidden + drop(sparse + shared(layer.shared_mlp, inner)) * scale
    hidden = norm(model.model.norm, hidden)
    return F.linear(hidden, model.lm_head.weight) / model.config.logits_scaling, balance
