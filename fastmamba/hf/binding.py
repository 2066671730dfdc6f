"""A forward on one instance: put there, known again, taken off."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass(frozen=True)
class Binding:
    """What a bound forward was made with."""

    scope: str
    backend: str
    stood: bool
    """The module's __dict__ already held its class's own forward, as accelerate and unpickling leave it."""
    precision: str = "exact"
    state_dtype: Any = None


# Function -> binding. Not an attribute of the function, because accelerate copies those onto its own wrapper.
bindings: WeakKeyDictionary[types.FunctionType, Binding] = WeakKeyDictionary()


def slot_of(module: Any) -> str:
    """The key of module.__dict__ that holds its forward. Where accelerate wrapped it, that is not "forward"."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def binding_in(module: Any, slot: str) -> Binding | None:
    """What the forward in a slot was made with; None where it is none of ours."""
    current: Any = module.__dict__.get(slot)
    function = getattr(current, "__func__", None)
    if isinstance(function, types.FunctionType) and current.__self__ is module:
        return bindings.get(function)
    return None


def bind(module: Any, slot: str, function: Callable[..., Any]) -> None:
    """Make a function the module's forward."""
    module.__dict__[slot] = types.MethodType(function, module)


def restore(module: Any, slot: str, binding: Binding | None) -> None:
    """Give a module its class's forward back, as it was before `bind`."""
    attributes = module.__dict__
    ours = attributes[slot]
    own = types.MethodType(type(module).forward, module)
    if slot == "forward" and binding is not None and not binding.stood:
        del attributes["forward"]
        return
    attributes[slot] = own
    wrapper = attributes.get("forward")
    if getattr(wrapper, "__wrapped__", None) == ours:  # accelerate's wrapper, made while ours was bound
        functools.update_wrapper(wrapper, own)


def why_alone(module: Any, cls: type, current: object) -> str:
    """Why a module of class `cls`, with `current` for a forward of its own, has to be left alone, or ''."""
    own = type(module).forward
    if own is not cls.__dict__.get("forward"):
        return f"{type(module).__name__} overrides forward"
    if not (own.__module__ or "").startswith("transformers."):
        return f"the forward of class {cls.__name__} was replaced"
    if current is not None and current != types.MethodType(type(module).forward, module):
        return "its forward was already replaced by something else"
    return ""
