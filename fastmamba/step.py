"""The mixer forward of one token that continues a cache: what generation spends its time in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmamba.ops import mixer_step

if TYPE_CHECKING:
    from fastmamba.mixer import MixerPlan, MixerState, MixerView


def can_step(hidden_states: Tensor, state: MixerState | None) -> bool:
    """Whether a call is one token with states to update in place. A cache that records its past grows instead."""
    if state is None or hidden_states.shape[1] != 1:
        return False
    return state.ssm is not None and state.conv is not None and not state.record_past


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
