"""What a recorded one-token forward depends on, and whether it is as it was: model, configuration, cache."""

from __future__ import annotations

import itertools
from itertools import repeat
from operator import is_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_address = torch.Tensor.data_ptr
_ref_call = ref.__call__
_attribute = object.__getattribute__  # not a configuration's own, which is slow


class _Part:
    """Modules of which nothing may change that a tape has baked in: where weights are, which modules, no new hooks."""

    def __init__(self, modules: list[nn.Module]) -> None:
        weights = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
        self._tensors = [tensor for tensors in weights for tensor in tensors.values() if tensor is not None]
        self._addresses = list(map(_address, self._tensors))
        # Dictionaries are compared by the identity of what they hold. Where tensors differ, == of them raises; with one
        # element it does not, and addresses are told apart below only for the tensors from before.
        self._plain = all(tensor.numel() != 1 for tensor in self._tensors)
        self._now = [*weights, *(module._modules for module in modules if module._modules)]
        self._then = [dict(content) for content in self._now]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._lengths = list(map(len, self._hooks)) if any(self._hooks) else None
        self._dicts = [module.__dict__ for module in modules]
        self._forwards = [attributes.get("forward") for attributes in self._dicts]

    def _same(self) -> bool:
        """Whether the same weights and modules are in place."""
        if self._plain:
            return self._now == self._then
        return all(
            content.keys() == before.keys() and all(map(is_, content.values(), before.values()))
            for content, before in zip(self._now, self._then, strict=True)
        )

    def holds(self) -> bool:
        """Whether all is as it was. This runs at every call: loops in C alone."""
        try:
            return (
                self._same()
                and list(map(_address, self._tensors)) == self._addresses
                and (not any(self._hooks) if self._lengths is None else list(map(len, self._hooks)) == self._lengths)
                and list(map(dict.get, self._dicts, repeat("forward"))) == self._forwards
            )
        except (TypeError, RuntimeError):  # another tensor is there, or nothing has an address on the meta device
            return False


class Structure:
    """What tapes have baked in of a model, in parts: each is looked at just before it runs.

    While the host looks at one part, the GPU works on those before it. Part 0 has all that is no layer.
    """

    def __init__(self, root: nn.Module, mixers: list[Any], attention: list[nn.Module]) -> None:
        self.layers, self.cuts = _cut(root, mixers, attention)
        inside = {inner: None for layer in self.layers for inner in layer.modules()}
        parts = [[module for module in root.modules() if module not in inside]]
        for start, end in itertools.pairwise([0, *self.cuts, len(self.layers)]):
            # The part before may have taken this one's first norm already. If that has changed, its result is not used.
            found = list(dict.fromkeys(inner for layer in self.layers[start:end] for inner in layer.modules()))
            parts = [parts[0] + found] if start == 0 else [*parts, found]
        self._parts = list(map(_Part, parts))
        owned = [set(part) for part in parts]
        self.indices = [[mixer.layer_idx for mixer in mixers if mixer in part] for part in owned]
        """Of the mixers, by part."""

    def holds(self, part: int) -> bool:
        """Whether a part is as it was."""
        return self._parts[part].holds()

    def holds_all(self) -> bool:
        """Whether all parts are."""
        return all(part.holds() for part in self._parts)


def _cut(root: nn.Module, mixers: list[nn.Module], attention: list[nn.Module]) -> tuple[list[nn.Module], list[int]]:
    """The model's list of layers, and those with which a part begins; both empty where it cannot be cut.

    Where there is attention, graphs end anyway, and a part begins with it. A part is looked at while the one before it
    runs, so the first ones are small and others are larger.
    """
    for module in root.modules() if mixers else ():
        if not isinstance(module, nn.ModuleList):
            continue
        layers = list(module)
        owner = {inner: index for index, layer in enumerate(layers) for inner in layer.modules()}
        if not all(inner in owner for inner in (*mixers, *attention)) or len(set(layers)) != len(layers):
            continue
        attending = {owner[inner] for inner in attention}
        if attending & {owner[inner] for inner in mixers}:
            break  # what runs before attention changes a state, and could not run again
        count = len(layers)
        growing = {cut for cut in (count // 32, count // 8, count * 3 // 8) if cut < min(attending, default=count)}
        return layers, sorted((attending | growing) - {0})
    return [], []


class Config:
    """What a call reads of a model's configuration, whose attributes take long: read again when it has changed."""

    def __init__(self, config: Any) -> None:
        self._config, self._then = config, dict(_attribute(config, "__dict__"))
        self.use_cache = getattr(config, "use_cache", True)
        self.experts = getattr(config, "_experts_implementation", None)
        self.return_dict = getattr(config, "return_dict", True)
        self.outputs = [name for name in _OUTPUTS if getattr(config, name, False)]

    def holds(self, config: Any) -> bool:
        """Whether it is as it was."""
        return config is self._config and _attribute(config, "__dict__") == self._then


class Bound:
    """The cache that a tape is set to: where the states of each part's layers are."""

    def __init__(self, cache: Any, parts: list[list[int]], states: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.cache = ref(cache)
        self._parts = []
        for indices in parts:
            tensors = [tensor for index in indices for tensor in states[index]]
            self._parts.append((indices, list(map(ref, tensors)), list(map(_address, tensors))))

    def holds(self, layers: list[Any], part: int) -> bool:
        """Whether the states of a part are the same tensors in the same place, ready for one more token."""
        indices, references, addresses = self._parts[part]
        states = states_of(layers, indices)
        if isinstance(states, str):
            return False
        tensors = [tensor for pair in states.values() for tensor in pair]
        return all(map(is_, map(_ref_call, references), tensors)) and list(map(_address, tensors)) == addresses


def states_of(layers: list[Any], indices: list[int]) -> dict[int, tuple[Tensor, Tensor]] | str:
    """The conv state and state of a cache's layers; or why there are none for a tape, empty for a first token."""
    if indices and len(layers) <= indices[-1]:
        return ""  # nothing in it yet
    found = {}
    try:
        for index in indices:
            layer = layers[index]
            if not layer.has_previous_state[0]:
                return ""
            if layer.record_past:
                return "the cache records its past"
            found[index] = layer.conv_states[0], layer.recurrent_states[0]
    except (AttributeError, KeyError, TypeError):
        return "unknown kind of cache"
    return found
