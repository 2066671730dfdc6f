"""What differs between the supported transformers versions: how a cache is read and written, how the norm groups."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from fastmamba.memory import new_empty

SUPPORTED = ((5, 15), (5, 24))
"""Lowest supported (major, minor), and the first that is not."""


def check_version() -> None:
    """Raise unless the installed transformers is one that was tested."""
    version = transformers.__version__
    found = re.match(r"(\d+)\.(\d+)", version)
    low, high = SUPPORTED
    if found is None or not low <= (int(found[1]), int(found[2])) < high:
        bounds = ">={}.{},<{}.{}".format(*low, *high)
        raise RuntimeError(f"transformers {version} is not supported; fastmamba is tested with transformers{bounds}")


def captures(hook: object) -> bool:
    """Whether a hook is one of those with which transformers collects outputs that a call may ask for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def hooks_now(module: Any) -> list[Any]:
    """A module's forward hooks, without those that collect outputs where the call under way asks for none.

    The first call that does has them installed, on routers too whatever it asks for, and there they stay.
    """
    from transformers.utils.output_capturing import _active_collector

    hooks = list(module._forward_hooks.values())
    return hooks if _active_collector.get() else [hook for hook in hooks if not captures(hook)]


class CacheState:
    """One layer's part of a transformers cache, for `mixer_forward`."""

    __slots__ = ("_cache", "_index", "_layer", "_width", "conv", "record_past", "ssm")

    def __init__(self, cache: Any, layer: Any, index: int, width: int) -> None:
        self._cache, self._layer, self._index, self._width = cache, layer, index, width
        known = layer.has_previous_state[0]  # after a reset the tensors are there, zeroed, and hold nothing
        self.conv: Tensor | None = layer.conv_states[0] if known else None
        self.ssm: Tensor | None = layer.recurrent_states[0] if known else None
        self.record_past: bool = layer.record_past

    def write_conv(self, inputs: Tensor) -> None:
        """Append inputs (B, channels, T) to the conv state, in place unless the cache records its past."""
        self._cache.update_conv_state(inputs, self._index, conv_kernel_size=self._width)

    def new_conv(self, projected: Tensor, channels: int) -> Tensor | None:
        """A first call's conv state (B, channels, W), to be filled with the last inputs, a part of `projected`.

        None where the state continues an earlier one or cannot be written like that: then `write_conv` is to be called.
        """
        layer = self._layer
        if self.conv is not None or self.record_past or torch.compiler.is_compiling():
            return None
        shape = (projected.shape[0], channels, self._width)
        if not layer.is_conv_states_initialized[0]:
            # What the layer's lazy_initialization does, without the zeros: all of it is about to be written.
            if layer.device is None:
                layer.dtype, layer.device = projected.dtype, projected.device
            layer.conv_kernel_size[0] = self._width
            state = layer.conv_states[0] = new_empty(projected, shape)
            torch._dynamo.mark_static_address(state)
            layer.is_conv_states_initialized[0] = True
        else:
            state = layer.conv_states[0]
            if state.shape != shape or state.device != projected.device:
                return None
        layer.has_previous_state[0] = True
        return state

    def write_ssm(self, states: Tensor) -> None:
        """Put states (B, H, P, N), which are nobody else's, into the cache."""
        layer = self._layer
        if layer.is_recurrent_states_initialized[0] or torch.compiler.is_compiling() or not _owns_its_memory(states):
            self._cache.update_recurrent_state(states, self._index)
            return
        # What the layer would do with a copy.
        torch._dynamo.mark_static_address(states)
        layer.recurrent_states[0] = states
        layer.is_recurrent_states_initialized[0] = True


def _owns_its_memory(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def cache_layer(cache: Any, index: int) -> Any | None:
    """Return a cache's layer, or None where cache or layer don't keep Mamba states in the way transformers does.

    A subclass that writes them differently (compressed, say) is not read behind its back.
    """
    layers = getattr(cache, "layers", None)
    if layers is None or not 0 <= index < len(layers):
        return None
    layer = layers[index]
    writes = getattr(type(layer), "update_conv_state", None), getattr(type(layer), "update_recurrent_state", None)
    if writes != (LinearAttentionLayer.update_conv_state, LinearAttentionLayer.update_recurrent_state):
        return None
    kind = type(cache)
    if getattr(kind, "update_conv_state", None) is not Cache.update_conv_state:
        return None
    if getattr(kind, "update_recurrent_state", None) is not Cache.update_recurrent_state:
        return None
    return layer


def norm_plan(mixer: nn.Module) -> dict[str, Any]:
    """Read a mixer's norm: the fields of `MixerPlan` that describe it.

    A norm carries group_size (all but FalconH1 from 5.23, some before), or n_groups and norm_before_gate (FalconH1), or
    neither: then it norms the whole width. A module of another kind, such as an adapter's wrapper, is called as it is.
    """
    norm: Any = mixer.norm
    if isinstance(norm, nn.Identity):
        return {"gated": False}
    if not type(norm).__name__.endswith("RMSNormGated") or not type(norm).__module__.startswith("transformers.models."):
        return {}
    group_size = getattr(norm, "group_size", None)
    if group_size is None and hasattr(norm, "n_groups"):
        group_size = norm.weight.shape[0] // norm.n_groups
    return {
        "norm_class": type(norm),
        "norm_group_size": group_size,
        "norm_before_gate": getattr(norm, "norm_before_gate", False),
    }
