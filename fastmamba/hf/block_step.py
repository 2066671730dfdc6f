"""One token through a branch of a layer together with the norm before it and the residual add after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmamba.hf.binding import binding_in
from fastmamba.hf.block import is_silu
from fastmamba.hf.compat import CacheState, cache_layer
from fastmamba.hf.experts import why_not
from fastmamba.hf.forward import plan_of
from fastmamba.hf.recording import state_for, under_way, zeros
from fastmamba.mixer import norm_is_plain
from fastmamba.ops import mlp_step, resolve_backend
from fastmamba.step import can_step, is_linear, layer_forward, layer_is_plain

MOST_ROWS = 1
"""The largest batch that `feed_forward` takes: it reads the weights once a row, matrix products once a batch."""

_GRANITE = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"


def step(
    mixer: Any,
    norm: Any,
    hidden_states: Tensor,
    cache: Any,
    mask: Tensor | None,
    factor: float,
    sum_dtype: torch.dtype | None,
) -> Tensor | None:
    """hidden_states + factor * mixer(norm(hidden_states)), in three launches; None where it takes the ordinary way.

    Args:
        mixer: the mixer.
        norm: an RMSNorm that can be fused.
        hidden_states: (B, T, hidden size).
        cache: the model's cache.
        mask: (B, T).
        factor: multiplies what the mixer returns.
        sum_dtype: of the sum; None for that of hidden_states.
    """
    if cache is None or mask is not None or hidden_states.shape[1] != 1:
        return None
    plan = plan_of(mixer)
    if plan is None or mixer._forward_hooks or mixer._forward_pre_hooks or "_hf_hook" in mixer.conv1d.__dict__:
        return None
    plain_norm = norm_is_plain(mixer.norm, plan) and "_hf_hook" not in mixer.norm.__dict__
    if not layer_is_plain(mixer, plan, hidden_states.shape[0], plain_norm):
        return None
    layer = cache_layer(cache, mixer.layer_idx)
    if layer is None:
        return None
    state: Any = CacheState(cache, layer, mixer.layer_idx, mixer.conv_kernel_size)
    if not can_step(hidden_states, state) or state.ssm.device != hidden_states.device:
        return None
    if sum_dtype is not None:
        hidden_states = hidden_states.to(sum_dtype)
    return layer_forward(mixer, plan, hidden_states, state_for(mixer, state), norm, factor)


def can_feed(layer: Any, hidden_states: Tensor, backend: str) -> bool:
    """Whether `feed_forward` can take the place of what follows the mixer or attention in a GraniteMoeHybrid layer.

    It reads the weights: the modules have to be transformers' own, without a hook, an adapter or a quantised weight.
    """
    if hidden_states.shape[0] > MOST_ROWS or resolve_backend(backend, hidden_states.device) != "triton":
        return False
    mlp = layer.shared_mlp
    if not _own(mlp, "GraniteMoeHybridMLP") or not _silu(mlp.activation):
        return False
    if not all(is_linear(linear) and linear.bias is None for linear in (mlp.input_linear, mlp.output_linear)):
        return False
    if layer.has_experts:
        mixture = layer.block_sparse_moe
        if not _own(mixture, "GraniteMoeHybridMoE") or why_not(mixture, hidden_states) is not None:
            return False
    weight = mlp.input_linear.weight
    form = weight.dtype, hidden_states.device
    return (
        all((w.dtype, w.device) == form and w.is_contiguous() for w in (weight, mlp.output_linear.weight))
        and weight.is_floating_point()
        and not torch.is_autocast_enabled(form[1].type)
    )


def feed_forward(layer: Any, norm: Any, hidden_states: Tensor, factor: float, backend: str) -> Tensor:
    """hidden_states + factor * (experts(norm(hidden_states)) + mlp(norm(hidden_states))), where `can_feed` holds.

    Args:
        layer: a GraniteMoeHybridDecoderLayer.
        norm: an RMSNorm that can be fused.
        hidden_states: (B, 1, hidden size).
        factor: multiplies the sum.
        backend: "auto" or "triton".
    """
    mlp = layer.shared_mlp
    experts: dict[str, Any] = {}
    if layer.has_experts:
        router, chosen = layer.block_sparse_moe.router, layer.block_sparse_moe.experts
        experts = {
            "router_weight": router.weight,
            "expert_in_weight": chosen.gate_up_proj,
            "expert_out_weight": chosen.down_proj,
            "top_k": router.top_k,
        }
    return mlp_step(
        hidden_states[:, 0],
        mlp.input_linear.weight,
        mlp.output_linear.weight,
        norm_weight=norm.weight,
        norm_eps=norm.variance_epsilon,
        residual_scale=factor,
        counter=zeros(hidden_states.shape[0], hidden_states.device) if experts else None,
        overlap=under_way(),  # there it is known what comes before
        backend=backend,
        **experts,
    )[:, None]


def _own(module: Any, name: str) -> bool:
    """Whether a module is transformers' own of that name, with our forward, and nobody watches it."""
    cls = type(module)
    if (cls.__module__, cls.__qualname__) != (_GRANITE, name) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return "_hf_hook" not in module.__dict__ and binding_in(module, "forward") is not None


def _silu(module: Any) -> bool:
    return is_silu(module) and not module._forward_hooks and not module._forward_pre_hooks
