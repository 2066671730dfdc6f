"""scope="block": which modules around the mixers get a forward of their own, and how they get it and lose it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn

from fastmamba.hf.binding import Binding, bind, binding_in, bindings, restore, slot_of, why_alone
from fastmamba.hf.report import BlockReport, forget_calls, original_calls

_MAMBA2 = "transformers.models.mamba2.modeling_mamba2"
_GRANITE = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"

# Module and class -> the kind of forward it gets.
_KINDS = {
    (_MAMBA2, "Mamba2Block"): "mamba2_block",
    (_MAMBA2, "Mamba2RMSNorm"): "norm",
    (_GRANITE, "GraniteMoeHybridDecoderLayer"): "granite_layer",
    (_GRANITE, "GraniteMoeHybridRMSNorm"): "norm",
    (_GRANITE, "GraniteMoeHybridMLP"): "mlp",
    (_GRANITE, "GraniteMoeHybridMoE"): "moe",
}
# Kind of layer -> its first norm, and whether that rounds to the dtype of its weight.
_FIRST_NORM = {"mamba2_block": ("norm", True), "granite_layer": ("input_layernorm", False)}
_FINAL_NORMS = ("norm_f", "norm")


@dataclass(frozen=True)
class _Part:
    """A module that scope="block" covers."""

    module: Any
    kind: str
    slot: str
    binding: Binding | None
    """Of the forward of ours that is bound now."""
    reason: str
    """Why it has to be left alone, or the empty string."""


def _parts(model: nn.Module) -> Iterator[_Part]:
    """Find the modules that scope="block" covers. Nothing changes."""
    for module in model.modules():
        for cls in type(module).__mro__:
            kind = _KINDS.get((cls.__module__, cls.__qualname__))
            if kind is None:
                continue
            slot = slot_of(module)
            binding = binding_in(module, slot)
            reason = "" if binding is not None else why_alone(module, cls, module.__dict__.get(slot))
            if kind == "mlp" and not is_silu(getattr(module, "activation", None)):
                reason = "its activation is not silu"
            elif kind == "moe" and not reason:
                reason = _replaced(module.children())
            yield _Part(module, kind, slot, binding, reason)
            break


def _replaced(modules: Iterable[nn.Module]) -> str:
    """Which class of transformers' has had its forward replaced, of modules that `moe` would stand for; or ''."""
    for cls in map(type, modules):
        if cls.__module__ == _GRANITE and not (cls.forward.__module__ or "").startswith("transformers."):
            return f"the forward of class {cls.__name__} was replaced"
    return ""


def is_silu(module: object) -> bool:
    """Whether an activation is SiLU: torch's module, or transformers' own class for the name "silu"."""
    cls = type(module)
    return cls is nn.SiLU or (cls.__module__, cls.__qualname__) == ("transformers.activations", "SiLUActivation")


@functools.cache
def _function(kind: str, binding: Binding) -> Any:
    """The forward of a kind of module. All that need the same one share it."""
    from fastmamba.hf import block_forward

    makers: dict[str, Callable[[str], Any]] = {
        "norm": block_forward.norm_forward,
        "mlp": block_forward.mlp_forward,
        "moe": block_forward.moe_forward,
        "mamba2_block": block_forward.mamba2_block_forward,
        "granite_layer": block_forward.granite_layer_forward,
    }
    function = makers[kind](binding.backend)
    bindings[function] = binding
    return function


def bind_blocks(model: nn.Module, backend: str) -> None:
    """Give the layers of a model, their norms, multilayer perceptrons and experts the forwards of scope="block"."""
    from fastmamba.hf.block_forward import following

    for part in list(_parts(model)):
        if part.reason:
            continue
        stood = part.binding.stood if part.binding is not None else part.slot in part.module.__dict__
        bind(part.module, part.slot, _function(part.kind, Binding("block", backend, stood)))
        forget_calls(part.module)
    kinds = {part.module: part.kind for part in _parts(model) if part.binding is not None}
    for parent in model.modules():
        for layers in parent.children():
            if isinstance(layers, nn.ModuleList):
                for layer, norm, by_weight in _followed(parent, list(layers), kinds):
                    following[layer] = ref(norm), by_weight


def _followed(parent: Any, layers: list[Any], kinds: dict[Any, str]) -> Iterator[tuple[nn.Module, nn.Module, bool]]:
    """For each layer of a list, the norm that its output meets next. A wrong guess costs time, no answer."""
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        if kinds.get(layer) not in _FIRST_NORM:
            continue
        if after is None:
            norm = next((getattr(parent, name) for name in _FINAL_NORMS if hasattr(parent, name)), None)
            by_weight = False
        elif kinds.get(after) in _FIRST_NORM:
            name, by_weight = _FIRST_NORM[kinds[after]]
            norm = getattr(after, name)
        else:
            continue
        if norm is not None and kinds.get(norm) == "norm":
            yield layer, norm, by_weight


def unbind_blocks(model: nn.Module) -> None:
    """Take the forwards of scope="block" off again."""
    from fastmamba.hf.block_forward import following

    for part in list(_parts(model)):
        following.pop(part.module, None)
        if part.binding is not None:
            restore(part.module, part.slot, part.binding)
            forget_calls(part.module)


def block_backend(model: nn.Module) -> str | None:
    """The backend that the layers of a model are bound with; None where they are not."""
    return next((part.binding.backend for part in _parts(model) if part.binding is not None), None)


def layer_of(model: nn.Module) -> dict[nn.Module, str]:
    """Mixer -> the kind of the layer around it, for layers that run the forward of scope="block"."""
    found = {}
    for part in _parts(model):
        if part.kind in _FIRST_NORM and part.binding is not None:
            found.update(dict.fromkeys(part.module.children(), part.kind))
    return found


def block_report(model: nn.Module) -> BlockReport | None:
    """What became of the layers around the mixers; None where scope="block" does not cover the model."""
    found = list(_parts(model))
    parts = [part for part in found if part.kind in _FIRST_NORM]
    if not parts:
        return None
    mixtures = [part for part in found if part.kind == "moe"]
    reasons = {part.reason for part in parts if part.reason}
    reasons |= {f"transformers' experts: {part.reason}" for part in mixtures if part.reason}
    fast = sum(part.binding is not None for part in parts)
    return BlockReport(len(parts), fast, tuple(sorted(reasons)), _calls(parts), _calls(mixtures))


def _calls(parts: list[_Part]) -> dict[str, int]:
    """Calls of these modules that ran the original forward, by reason."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(original_calls(part.module))
    return dict(total)
