"""One Mamba-2 mixer forward: prefill, prefill that continues a cache, and the one-token step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmamba.modules import call_linear, child, parameter
from fastmamba.ops import mixer_prefill, resolve_backend
from fastmamba.step import can_step, step_forward


class MixerView(Protocol):
    """What the forward reads of a mixer, at each call, because users move, cast and merge weights.

    The projection splits, in this order, into z (D) | x (D) | B (G*N) | C (G*N) | dt (H), with D = H*P.
    """

    num_heads: int  # H
    head_dim: int  # P
    n_groups: int  # G
    ssm_state_size: int  # N
    intermediate_size: int  # D
    conv_dim: int  # D + 2*G*N
    conv_kernel_size: int  # W
    time_step_limit: tuple[float, float]
    activation: str
    A_log: Tensor  # (H,)
    D: Tensor  # (H,)
    dt_bias: Tensor  # (H,)
    # Modules. The projections are called, never read: adapters, quantised weights and offloading live in the call.
    in_proj: Any
    out_proj: Any
    conv1d: Any
    norm: Any


@dataclass(frozen=True)
class MixerPlan:
    """What does not change from call to call."""

    backend: str = "auto"
    gated: bool = True
    """Whether the mixer has a gated norm; without one, z gates the scan's output."""
    norm_class: type | None = None
    """Class of a norm that `gated_rms_norm` may replace; a norm of any other class is called as the module it is."""
    norm_group_size: int | None = None
    norm_before_gate: bool = False
    in_scale: str | None = None
    """Attribute of the mixer that multiplies the input of in_proj."""
    projection_scale: str | None = None
    """Attribute of the mixer that multiplies the projection."""
    precision: str = "exact"
    state_dtype: torch.dtype | None = None
    """As `ops.ssd` has them; None is float32, and so is a dtype that is not that of the activations."""


class MixerState(Protocol):
    """A layer's part of a cache, as the forward sees it."""

    conv: Tensor | None
    """(B, D + 2*G*N, S), the last inputs of the convolution, oldest first; None before the first token."""
    ssm: Tensor | None
    """(B, H, P, N); None before the first token."""
    record_past: bool
    """The cache keeps every input of the convolution, so that it can be rolled back."""

    def new_conv(self, projected: Tensor, channels: int) -> Tensor | None:
        """The conv state itself, to be filled with the last of a first call's inputs, of `channels` channels.

        They are a part of `projected` (B, T, ...). None where `write_conv` has to be given them instead.
        """

    def write_conv(self, inputs: Tensor) -> None:
        """Append inputs (B, D + 2*G*N, T) to the conv state."""

    def write_ssm(self, states: Tensor) -> None:
        """Replace the state by (B, H, P, N), a tensor that the caller makes no further use of."""


NO_LIMIT = (0.0, math.inf)
"""Bounds of dt of a single token that continues a cache: transformers' one-token step does not clamp it."""

_TILE = 1024
"""Tokens that the PyTorch backend takes through the mixer at a time, so that activations stay small."""


class _Carried:
    """What one tile hands to the next."""

    record_past = False

    def __init__(self, state: MixerState | None) -> None:
        self.conv: Any = None if state is None else state.conv
        self.ssm: Any = None if state is None else state.ssm

    def new_conv(self, projected: Tensor, channels: int) -> None:
        return None

    def write_conv(self, inputs: Tensor) -> None:
        self.conv = inputs.clone()  # a view would keep the tile's projection

    def write_ssm(self, states: Tensor) -> None:
        self.ssm = states


def norm_is_plain(norm: Any, plan: MixerPlan) -> bool:
    """Whether the norm can be fused: of the class the plan knows, with no forward hook of the user's to miss."""
    kind: type = type(norm)
    return kind is plan.norm_class and not norm._forward_hooks and not norm._forward_pre_hooks


def mixer_forward(
    mixer: MixerView, plan: MixerPlan, hidden_states: Tensor, state: MixerState | None, mask: Tensor | None
) -> Tensor:
    """Run a mixer.

    Args:
        mixer: the module.
        plan: what is fixed for it.
        hidden_states: (B, T, hidden size).
        state: the layer's cache, read and written in place; None runs without one.
        mask: (B, T), 0 at padding; it multiplies hidden_states, and x, B and C after the convolution, but not dt.

    Returns:
        (B, T, hidden size), what out_proj makes of it.
    """
    if can_step(hidden_states, state):
        return step_forward(mixer, plan, hidden_states, state, norm_is_plain(mixer.norm, plan))
    tiles = _tiles(mixer, plan, hidden_states, state)
    if not tiles:
        return _forward(mixer, plan, hidden_states, state, mask)
    carried = _Carried(state)
    output: Any = None
    for tile in tiles:
        part = _forward(mixer, plan, hidden_states[:, tile], carried, None if mask is None else mask[:, tile])
        if output is None:
            output = part.new_empty((*hidden_states.shape[:2], part.shape[2]))
        output[:, tile] = part
    if state is not None:
        state.write_conv(carried.conv)
        state.write_ssm(carried.ssm)
    return output


def _tiles(mixer: MixerView, plan: MixerPlan, hidden_states: Tensor, state: MixerState | None) -> list[slice]:
    """How to cut a long call on the PyTorch backend; nothing where it is to run in one piece.

    No tile is shorter than _TILE: a single token would be taken for a one-token step.
    """
    tokens = hidden_states.shape[1]
    if tokens < 2 * _TILE or torch.compiler.is_compiling() or (state is not None and state.record_past):
        return []
    if resolve_backend(plan.backend, hidden_states.device) != "torch":
        return []
    for projection in (mixer.in_proj, mixer.out_proj):
        # Hooks of the user's expect one call; accelerate's would bring offloaded weights in for every tile.
        if projection._forward_hooks or projection._forward_pre_hooks or "_hf_hook" in projection.__dict__:
            return []
    starts = range(0, tokens - _TILE + 1, _TILE)
    return [slice(start, tokens if start == starts[-1] else start + _TILE) for start in starts]


def _forward(
    mixer: MixerView, plan: MixerPlan, hidden_states: Tensor, state: MixerState | None, mask: Tensor | None
) -> Tensor:
    """`mixer_forward` in one piece."""
    dtype = hidden_states.dtype
    if mask is not None:
        hidden_states = (hidden_states * mask[:, :, None]).to(dtype)
    if plan.in_scale is not None:
        hidden_states = hidden_states * getattr(mixer, plan.in_scale)
    projected = call_linear(child(mixer, "in_proj"), hidden_states)  # [B, T, 2*D + 2*G*N + H]
    if plan.projection_scale is not None:
        projected = projected * getattr(mixer, plan.projection_scale)

    conv1d, norm = child(mixer, "conv1d"), child(mixer, "norm")
    fused = plan.gated and norm_is_plain(norm, plan)
    if fused:
        gate = "after" if plan.norm_before_gate else "before"
    else:
        gate = "none" if plan.gated else "before"
    conv = ssm = new_conv = None
    dt_limit: Any = mixer.time_step_limit
    if type(dt_limit) is list:  # as a config from a file has it; calls that came before are found by a hash
        dt_limit = tuple(dt_limit)
    if state is not None:
        conv, ssm = state.conv, state.ssm
        new_conv = state.new_conv(projected, mixer.conv_dim)
        if (
            ssm is not None and projected.shape[1] == 1
        ):  # with a cache that records its past: `can_step` took the others
            dt_limit = NO_LIMIT
    found: Any = mixer_prefill(
        projected,
        parameter(conv1d, "weight"),
        parameter(conv1d, "bias"),
        parameter(mixer, "A_log"),
        parameter(mixer, "D"),
        parameter(mixer, "dt_bias"),
        groups=mixer.n_groups,
        norm_weight=parameter(norm, "weight") if fused else None,
        eps=norm.variance_epsilon if fused else 0.0,
        group_size=plan.norm_group_size if fused else None,
        gate=gate,
        activation=mixer.activation,
        dt_limit=dt_limit,
        mask=mask,
        initial_conv=None if conv is None else _last_inputs(conv, mixer.conv_kernel_size - 1),
        final_conv=new_conv,
        initial_states=ssm,
        return_final_states=state is not None,
        precision=plan.precision,
        state_dtype=dtype_or_float32(plan.state_dtype, projected),
        backend=plan.backend,
    )
    if state is None:
        y = found
    else:
        y, final = found
        state.write_ssm(final)
        if new_conv is None:  # after the convolution has read the old conv state
            inner = mixer.intermediate_size
            kept = projected[..., inner : inner + mixer.conv_dim]
            state.write_conv((kept if state.record_past else kept[:, -mixer.conv_kernel_size :]).mT)
    if gate == "none":
        y = norm(y, projected[..., : mixer.intermediate_size])
    del found, projected
    return call_linear(child(mixer, "out_proj"), y if y.dtype == dtype else y.to(dtype))


def dtype_or_float32(dtype: torch.dtype | None, activations: Tensor) -> torch.dtype:
    """The `state_dtype` of `ops.ssd` for these activations: the one asked for where it is theirs."""
    return activations.dtype if dtype is activations.dtype else torch.float32


def _last_inputs(conv: Tensor, count: int) -> Tensor:
    """The `count` last inputs in a conv state, (B, D + 2*G*N, count)."""
    missing = count - conv.shape[-1]
    # A cache that records its past does not pad a first call of fewer tokens.
    return F.pad(conv, (missing, 0)) if missing > 0 else conv[..., -missing:]
