"""The forwards that patch() binds, and the cases that they hand to the original one."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastmamba.hf.compat import CacheState, cache_layer
from fastmamba.hf.recording import state_for
from fastmamba.hf.report import GRADIENTS, count_original, warn_once
from fastmamba.mixer import MixerPlan, dtype_or_float32, mixer_forward, norm_is_plain
from fastmamba.modules import child, parameter
from fastmamba.ops import ssd

TRAINING = "training mode"
TENSOR = "hidden_states is not an ordinary tensor of shape (B, T, hidden size)"
META = "weights on the meta device"
WEIGHTS = "weights are not floating point"
DTYPE = "float64 on an accelerator"
PACKED = "packed sequences (seq_idx, cu_seqlens)"
MASK = "attention_mask is not of shape (B, T)"
CACHE = "unknown kind of cache"
STEP_MASK = "one-token step with a mask"
STATE_DEVICE = "cache on another device"

_SCAN = "mamba2_chunk_scan"


# Forwards that `mixer_scope` made, and what for.
_plans: WeakKeyDictionary[Any, MixerPlan] = WeakKeyDictionary()


def plan_of(mixer: Any) -> MixerPlan | None:
    """The plan of the forward that `mixer_scope` made for a mixer; None where it runs another, or under accelerate."""
    function = getattr(mixer.__dict__.get("forward"), "__func__", None)
    return None if function is None else _plans.get(function)


def mixer_scope(plan: MixerPlan) -> Callable[..., Tensor]:
    """A forward that runs the whole mixer fast."""

    # The name is how a bound method is pickled: as getattr(module, "forward"), the class's own forward when loaded.
    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        reason = _unsupported(self, hidden_states, attention_mask, kwargs)
        state = None
        if reason is None and cache_params is not None:
            layer = cache_layer(cache_params, self.layer_idx)
            if layer is None:
                reason = CACHE
            else:
                state = CacheState(cache_params, layer, self.layer_idx, self.conv_kernel_size)
                reason = _unsupported_state(state, hidden_states, attention_mask)
        if reason is not None:
            return _original(self, reason, hidden_states, cache_params, attention_mask, kwargs)
        state = state_for(self, state)
        conv1d, norm = child(self, "conv1d"), child(self, "norm")
        hooked = [conv1d] if "_hf_hook" in conv1d.__dict__ else []
        if plan.gated and "_hf_hook" in norm.__dict__ and norm_is_plain(norm, plan):
            hooked.append(norm)
        if not hooked:
            return mixer_forward(self, plan, hidden_states, state, attention_mask)
        return _with_weights(hooked, mixer_forward, self, plan, hidden_states, state, attention_mask)

    _plans[forward] = plan
    return forward


def ssd_scope(
    mixer_class: type, backend: str, precision: str, state_dtype: torch.dtype | None
) -> Callable[..., Tensor]:
    """A forward that is the class's own, with the scan over a sequence swapped for `fastmamba.ops.ssd`.

    Raises:
        RuntimeError: the class's forward has no such scan to swap.
    """
    own = _undecorated(mixer_class.forward)
    if own is None or _SCAN not in own.__code__.co_names:
        raise RuntimeError(f"scope='ssd' needs a forward that calls {_SCAN}; that of {mixer_class.__name__} does not")
    # The same code over a copy of its globals: the module itself stays as it is. Without a module name torch.compile
    # guards on this copy, not on the module's own globals.
    names = {**own.__globals__, _SCAN: _scan(backend, precision, state_dtype)}
    names.pop("__name__", None)
    swapped = types.FunctionType(own.__code__, names, "forward", own.__defaults__, own.__closure__)
    swapped.__kwdefaults__ = own.__kwdefaults__

    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        reason = _unsupported(self, hidden_states, attention_mask, kwargs)
        if reason is not None:
            return _original(self, reason, hidden_states, cache_params, attention_mask, kwargs)
        hooked = [self.conv1d] if "_hf_hook" in self.conv1d.__dict__ else []
        return _with_weights(hooked, swapped, self, hidden_states, cache_params, attention_mask, **kwargs)

    return forward


def _unsupported(mixer: Any, hidden_states: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why a call has to run the original forward, or None. This runs at every call: cheap checks only."""
    if mixer.training:
        return TRAINING  # with or without gradients, so that a checkpointed layer computes the same twice
    if type(hidden_states) is not Tensor or hidden_states.ndim != 3 or 0 in hidden_states.shape:
        return TENSOR
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in mixer.parameters())):
        return GRADIENTS
    if hidden_states.is_meta or parameter(mixer, "A_log").is_meta:
        return META
    if not (hidden_states.is_floating_point() and parameter(child(mixer, "conv1d"), "weight").is_floating_point()):
        return WEIGHTS
    if hidden_states.dtype is torch.float64 and not hidden_states.is_cpu:
        return DTYPE
    if kwargs and (kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None):
        return PACKED
    if mask is not None and (mask.ndim != 2 or mask.shape != hidden_states.shape[:2]):
        return MASK
    return None


def _unsupported_state(state: CacheState, hidden_states: Tensor, mask: Tensor | None) -> str | None:
    """Why a call with a cache has to run the original forward, or None."""
    if (state.conv is None) != (state.ssm is None):
        return CACHE
    if state.ssm is not None:
        if state.ssm.device != hidden_states.device:
            return STATE_DEVICE
        if mask is not None and hidden_states.shape[1] == 1:
            return STEP_MASK
    return None


def _original(
    mixer: Any, reason: str, hidden_states: Tensor, cache_params: Any, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    if not torch.compiler.is_compiling():
        count_original(mixer, reason)
        if reason is GRADIENTS:
            warn_once(
                "fastmamba ran a layer's original forward, because gradients were enabled outside training; "
                "wrap the call in torch.no_grad() to run the fast one"
            )
    return type(mixer).forward(mixer, hidden_states, cache_params, mask, **kwargs)


def _with_weights(hooked: list[Any], run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Run a function that reads the weights of modules without calling them, whose accelerate hooks fire around it."""
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        return run(*args, **kwargs)
    finally:
        for module in reversed(hooked):
            module._hf_hook.post_forward(module, ())


def _undecorated(forward: Callable[..., Tensor]) -> types.FunctionType | None:
    """The forward under transformers' decorator, which names what it wraps only from 5.16; None if it isn't found."""
    function: Any = inspect.unwrap(forward)
    while function.__name__ != "forward":
        inner = [cell.cell_contents for cell in function.__closure__ or () if inspect.isfunction(cell.cell_contents)]
        if len(inner) != 1:
            return None
        function = inner[0]
    return function


def _scan(backend: str, precision: str, state_dtype: torch.dtype | None) -> Callable[..., Any]:
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        z: Tensor | None = None,
        **_: Any,
    ) -> Any:
        # The chunk size changes the rounding alone, and the backend knows which one is fast.
        return ssd(
            hidden_states,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            initial_states,
            dt_softplus=dt_softplus,
            dt_limit=tuple(dt_limit),
            return_final_states=return_final_states,
            precision=precision,
            state_dtype=dtype_or_float32(state_dtype, hidden_states),
            backend=backend,
        )

    return mamba2_chunk_scan
