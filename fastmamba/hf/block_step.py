"""One token through a mixer together with the norm before it and the residual add after it, for scope="block"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmamba.hf.compat import CacheState, cache_layer
from fastmamba.hf.forward import plan_of
from fastmamba.hf.recording import state_for
from fastmamba.mixer import norm_is_plain
from fastmamba.step import can_step, layer_forward, layer_is_plain


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
    plain_norm = norm_is_plain(mixer, plan) and "_hf_hook" not in mixer.norm.__dict__
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
