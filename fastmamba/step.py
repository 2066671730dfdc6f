"""The mixer forward of one token that continues a cache: what generation spends its time in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmamba.modules import is_plain
from fastmamba.ops import layer_step, mixer_step, resolve_backend
from fastmamba.ops.layer_step import MOST_ROWS

if TYPE_CHECKING:
    from fastmamba.mixer import MixerPlan, MixerState, MixerView


def can_step(hidden_states: Tensor, state: MixerState | None) -> bool:
    """Whether a call is one token with states to update in place. A cache that records its past grows instead."""
    if state is None or hidden_states.shape[1] != 1:
        return False
    return state.ssm is not None and state.conv is not None and not state.record_past


def layer_is_plain(mixer: MixerView, plan: MixerPlan, batch: int, plain_norm: bool) -> bool:
    """Whether `ops.layer_step` can take the place of both projections and all between them.

    It reads the projections' weights, so these have to be linear layers and nothing else: no adapter, no quantised
    weight, no hook of the user's or of accelerate's.
    """
    if batch > MOST_ROWS or plan.in_scale is not None or plan.projection_scale is not None:
        return False
    weight = mixer.in_proj.weight
    if plan.gated and not (
        plain_norm and not plan.norm_before_gate and plan.norm_group_size in (None, mixer.intermediate_size)
    ):
        return False
    if not is_linear(mixer.in_proj) or not is_linear(mixer.out_proj) or mixer.out_proj.weight.dtype != weight.dtype:
        return False
    device = weight.device
    return resolve_backend(plan.backend, device) == "triton" and not torch.is_autocast_enabled(device.type)


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing else, whose weight may be read instead."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    attributes = module.__dict__
    if "_hf_hook" in attributes or "forward" in attributes:
        return False
    return is_plain(module.weight) and module.weight.stride(1) == 1


def layer_forward(
    mixer: MixerView,
    plan: MixerPlan,
    x: Tensor,
    state: Any,
    norm: Any = None,
    residual_scale: float | None = None,
) -> Tensor:
    """Run a mixer, or with `norm` and `residual_scale` the norm and the residual add around it, on one token.

    Args:
        mixer: the module, one of which `layer_is_plain` holds.
        plan: what is fixed for it.
        x: (B, 1, hidden size).
        state: the layer's cache, with both states, changed in place. Where it has `addresses`, see `ops.mixer_step`.
        norm: an RMSNorm with `weight` and `variance_epsilon`, applied to x; None for none.
        residual_scale: as in `ops.layer_step`.

    Returns:
        (B, 1, hidden size).
    """
    addresses = getattr(state, "addresses", None)
    conv1d, gate, in_proj, out_proj = mixer.conv1d, mixer.norm, mixer.in_proj, mixer.out_proj
    return layer_step(
        x[:, 0],
        state.conv,
        state.ssm,
        in_proj.weight,
        in_proj.bias,
        conv1d.weight.squeeze(1),
        conv1d.bias,
        mixer.A_log,
        mixer.D,
        mixer.dt_bias,
        out_proj.weight,
        out_proj.bias,
        groups=mixer.n_groups,
        norm_weight=None if norm is None else norm.weight,
        norm_eps=0.0 if norm is None else norm.variance_epsilon,
        gate_weight=gate.weight if plan.gated else None,
        gate_eps=gate.variance_epsilon if plan.gated else 0.0,
        residual_scale=residual_scale,
        activation=mixer.activation,
        addresses=addresses,
        overlap=addresses is not None,  # in a recording, where it is known what comes before
        backend=plan.backend,
    )[:, None]


def step_forward(mixer: MixerView, plan: MixerPlan, hidden_states: Tensor, state: Any, plain_norm: bool) -> Tensor:
    """Run a mixer on one token.

    Args:
        mixer: the module.
        plan: what is fixed for it.
        hidden_states: (B, 1, hidden size).
        state: the layer's cache, with both states, changed in place. Where it has `addresses`, see `ops.mixer_step`.
        plain_norm: the norm can be fused; otherwise it is called as the module it is.

    Returns:
        (B, 1, hidden size), what out_proj makes of it.
    """
    dtype = hidden_states.dtype
    if layer_is_plain(mixer, plan, hidden_states.shape[0], plain_norm):
        return layer_forward(mixer, plan, hidden_states, state)
    if plan.in_scale is not None:
        hidden_states = hidden_states * getattr(mixer, plan.in_scale)
    projected = mixer.in_proj(hidden_states)  # [B, 1, 2*D + 2*G*N + H]
    if plan.projection_scale is not None:
        projected = projected * getattr(mixer, plan.projection_scale)
    norm, conv1d = mixer.norm, mixer.conv1d
    fused = plan.gated and plain_norm
    if fused:
        gate = "after" if plan.norm_before_gate else "before"
    else:
        gate = "none" if plan.gated else "before"
    y = mixer_step(
        projected[:, 0],
        state.conv,
        state.ssm,
        conv1d.weight.squeeze(1),
        conv1d.bias,
        mixer.A_log,
        mixer.D,
        mixer.dt_bias,
        groups=mixer.n_groups,
        norm_weight=norm.weight if fused else None,
        eps=norm.variance_epsilon if fused else 0.0,
        group_size=plan.norm_group_size if fused else None,
        gate=gate,
        activation=mixer.activation,
        addresses=getattr(state, "addresses", None),
        backend=plan.backend,
    )[:, None]
    if plan.gated and not fused:
        y = norm(y, projected[..., : mixer.intermediate_size])
    return mixer.out_proj(y.to(dtype))
