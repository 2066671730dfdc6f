"""Put the fast forward on a model's mixers, take it off again, and say what was done."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastmamba.hf.families import FAMILIES, Family, belongs, match, match_root
from fastmamba.hf.report import GraphReport, LayerReport, Report, forget_calls, original_calls
from fastmamba.ops import BACKENDS, resolve_backend

SCOPES = ("mixer", "ssd")
"""What patch() may make fast: the whole mixer, or the scan alone."""

CUDA_GRAPHS = ("auto", "off")
"""Whether one-token calls may come from CUDA graphs."""

_KERNEL_SIZE = 256
"""The largest P and N of the Triton kernels."""

_OPS = {"mixer": ("causal_conv1d", "ssd", "ssd_step", "gated_rms_norm"), "ssd": ("ssd",)}


@dataclass(frozen=True)
class _Binding:
    """What a bound forward was made with."""

    scope: str
    backend: str
    stood: bool
    """The module's __dict__ already held its class's own forward, as accelerate and unpickling leave it."""


# Function -> binding. Not an attribute of the function, because accelerate copies those onto its own wrapper.
_bindings: WeakKeyDictionary[types.FunctionType, _Binding] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    """A mixer found in a model."""

    name: str
    module: Any
    family: Family
    slot: str
    """The key of module.__dict__ that holds its forward."""
    binding: _Binding | None
    """Of the fast forward that is bound now."""
    reason: str
    """Why the layer has to be left alone, or the empty string."""


def patch(model: nn.Module, *, scope: str = "mixer", backend: str = "auto", cuda_graphs: str = "auto") -> Report:
    """Make the Mamba-2 layers of a loaded transformers model fast, in place, on this instance alone.

    Each mixer gets a forward of its own. Class, state_dict, hooks and modules stay as they are; `unpatch` takes the
    forward off again; patching again re-binds with the new options. A call that the fast forward does not cover
    (gradients, training mode, packed sequences, an unknown cache) runs the original one, and `report` counts it.

    A deepcopy of a patched model is patched. A pickled one loads unpatched, also where fastmamba is not installed.

    Args:
        model: a transformers model of a supported family, or a module that holds one (PEFT's wrapper, say).
        scope: "mixer" replaces the whole mixer forward; "ssd" only the scan over a sequence inside the original one.
        backend: "triton", "torch", or "auto": Triton on a GPU, PyTorch anywhere else.
        cuda_graphs: "auto" records the model's one-token forward on its first use, on a GPU, and replays it from then
            on; attention layers stay out of the graphs. Calls that cannot be replayed run as without graphs, and
            `report` counts them by reason. "off" records nothing.

    Returns:
        What each layer got, or why it was left alone.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown `scope`, `backend` or `cuda_graphs`; a model of no supported family.
        RuntimeError: an unsupported transformers version; backend="triton" where it cannot run.
    """
    _check_options(scope, backend, cuda_graphs)
    layers = _survey(model)
    if layers:
        from fastmamba.hf.compat import check_version

        check_version()
    elif not any(belongs(module) for module in model.modules()):
        supported = ", ".join(family.mixer for family in FAMILIES)
        raise ValueError(f"model {type(model).__name__} has no supported layer (one of transformers' {supported})")

    # Everything that can fail happens before the first layer changes.
    made: dict[Any, Any] = {}
    bound = []
    for layer in layers:
        if not layer.reason:
            bound.append((layer, _make_forward(layer, scope, backend, made)))
    for layer, function in bound:
        _bind(layer.module, layer.slot, function)
        forget_calls(layer.module)
    if layers:
        _unbind_roots(model)
        if cuda_graphs == "auto" and scope != "ssd":
            _bind_roots(model)
    return report(model)


def unpatch(model: nn.Module) -> int:
    """Give every patched layer of a model its own forward back, exactly as it was.

    Returns:
        How many layers were patched.

    Raises:
        TypeError: `model` is not a module.
    """
    count = 0
    layers = _survey(model)
    if layers:
        _unbind_roots(model)
    for layer in layers:
        if layer.binding is not None:
            _restore(layer)
            forget_calls(layer.module)
            count += 1
    return count


@contextmanager
def patched(
    model: nn.Module, *, scope: str = "mixer", backend: str = "auto", cuda_graphs: str = "auto"
) -> Iterator[Report]:
    """`patch` a model for the length of a with block; afterwards each layer has the forward it had before."""
    before = {id(layer.module): layer.module.__dict__[layer.slot] for layer in _survey(model) if layer.binding}
    graphed = bool(before) and _has_bound_roots(model)
    yielded = patch(model, scope=scope, backend=backend, cuda_graphs=cuda_graphs)
    try:
        yield yielded
    finally:
        _unbind_roots(model)
        if graphed:
            _bind_roots(model)
        for layer in _survey(model):
            if layer.binding is None:
                continue
            earlier = before.get(id(layer.module))
            if earlier is None:
                _restore(layer)
            else:
                _bind(layer.module, layer.slot, earlier.__func__)


def report(model: nn.Module) -> Report:
    """Say of each mixer layer of a model whether it is fast, on what backend, and if not, why.

    Raises:
        TypeError: `model` is not a module.
    """
    layers = _survey(model)
    note = "" if layers else "The model has no Mamba-2 layer: there is nothing to patch."
    graphs = _graph_reports(model) if layers else ()
    return Report(type(model).__name__, tuple(map(_describe, layers)), note, graphs)


def binding_of(module: Any) -> _Binding | None:
    """What a mixer's fast forward was made with; None where it runs another."""
    for slot in ("_old_forward", "forward"):
        function = getattr(module.__dict__.get(slot), "__func__", None)
        if isinstance(function, types.FunctionType) and function in _bindings:
            return _bindings[function]
    return None


def _roots(model: nn.Module) -> Iterator[tuple[Any, Family]]:
    """The models whose one-token forward may come from a graph, each the outermost: one with a head, not its body."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        family = match_root(module)
        if family is not None and module not in inside:
            inside.update(module.modules())
            yield module, family


def _bind_roots(model: nn.Module) -> None:
    from fastmamba.hf.graphs import make_forward

    for root, family in _roots(model):
        # A forward that something else has put there, accelerate's for one, is left alone.
        if "forward" not in root.__dict__:
            _bind(root, "forward", make_forward(type(root), family))


def _unbind_roots(model: nn.Module) -> None:
    from fastmamba.hf import graphs

    for root, _ in _roots(model):
        graphs.forget(root)
        for slot in ("_old_forward", "forward"):
            bound = root.__dict__.get(slot)
            if not graphs.made(getattr(bound, "__func__", None)):
                continue
            if slot == "forward":
                del root.__dict__[slot]
                continue
            own = root.__dict__[slot] = types.MethodType(type(root).forward, root)
            wrapper = root.__dict__.get("forward")
            if getattr(wrapper, "__wrapped__", None) == bound:  # accelerate's wrapper, made while ours was bound
                functools.update_wrapper(wrapper, own)


def _has_bound_roots(model: nn.Module) -> bool:
    from fastmamba.hf.graphs import made

    return any(made(getattr(root.__dict__.get("forward"), "__func__", None)) for root, _ in _roots(model))


def _graph_reports(model: nn.Module) -> tuple[GraphReport, ...]:
    from fastmamba.hf.graphs import made, session_of

    reports = []
    for root, _ in _roots(model):
        if made(getattr(root.__dict__.get("forward"), "__func__", None)):
            session = session_of(root)
            reports.append(GraphReport(type(root).__name__) if session is None else session.report())
    return tuple(reports)


def _check_options(scope: object, backend: object, cuda_graphs: object) -> None:
    options = (("scope", scope, SCOPES), ("backend", backend, BACKENDS), ("cuda_graphs", cuda_graphs, CUDA_GRAPHS))
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _survey(model: object) -> list[_Layer]:
    """Find the mixers of a model and what became of their forward. Nothing changes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = []
    for name, module in model.named_modules():
        found = match(module)
        if found is None:
            continue
        family, cls = found
        slot = "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"
        current: Any = module.__dict__.get(slot)
        function = getattr(current, "__func__", None)
        binding = None
        if isinstance(function, types.FunctionType) and current.__self__ is module:
            binding = _bindings.get(function)
        reason = ""
        if binding is None:
            reason = _why_alone(module, cls, current)
        layers.append(_Layer(name, module, family, slot, binding, reason))
    return layers


def _why_alone(module: nn.Module, cls: type, current: object) -> str:
    own = type(module).forward
    if own is not cls.__dict__.get("forward"):
        return f"{type(module).__name__} overrides forward"
    if not (own.__module__ or "").startswith("transformers."):
        return f"the forward of class {cls.__name__} was replaced"
    if current is not None and current != types.MethodType(own, module):
        return "its forward was already replaced by something else"
    if module.activation not in ("silu", "swish"):
        return f"activation {module.activation!r} is not covered"
    return ""


def _make_forward(layer: _Layer, scope: str, backend: str, made: dict[Any, Any]) -> types.FunctionType:
    """A forward for a layer. Layers that need the same one share it."""
    from fastmamba.hf import compat, forward
    from fastmamba.mixer import MixerPlan

    module = layer.module
    stood = layer.binding.stood if layer.binding is not None else layer.slot in module.__dict__
    binding = _Binding(scope, _check_backend(module, backend), stood)
    key: Any
    if scope == "mixer":
        plan = MixerPlan(
            backend=binding.backend,
            in_scale=layer.family.in_scale,
            projection_scale=layer.family.projection_scale,
            **compat.norm_plan(module),
        )
        key = (binding, plan)
        make = functools.partial(forward.mixer_scope, plan)
    else:
        key = (binding, type(module))
        make = functools.partial(forward.ssd_scope, type(module), binding.backend)
    if key not in made:
        made[key] = make()
        _bindings[made[key]] = binding
    return made[key]


def _check_backend(module: Any, backend: str) -> str:
    """Raise where `backend` cannot serve a mixer; "auto" becomes "torch" where the kernels don't cover its sizes."""
    size = max(module.head_dim, module.ssm_state_size)
    if size > _KERNEL_SIZE:
        if backend == "triton":
            raise ValueError(f"backend='triton' takes head and state dimensions up to {_KERNEL_SIZE}, got {size}")
        return "torch"
    device = _device(module)
    if device.type != "meta":  # on the meta device there is nothing to tell by
        resolve_backend(backend, device)
    return backend


def _device(module: Any) -> torch.device:
    """Where a mixer runs: the device of its weights, or that to which accelerate brings them."""
    device = module.A_log.device
    if device.type == "meta":
        target = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
        device = device if target is None else torch.device(target)
    return device


def _bind(module: Any, slot: str, function: Callable[..., Any]) -> None:
    module.__dict__[slot] = types.MethodType(function, module)


def _restore(layer: _Layer) -> None:
    attributes = layer.module.__dict__
    ours = attributes[layer.slot]
    own = types.MethodType(type(layer.module).forward, layer.module)
    if layer.slot == "forward" and layer.binding is not None and not layer.binding.stood:
        del attributes["forward"]
        return
    attributes[layer.slot] = own
    wrapper = attributes.get("forward")
    if getattr(wrapper, "__wrapped__", None) == ours:  # accelerate's wrapper, made while ours was bound
        functools.update_wrapper(wrapper, own)


def _describe(layer: _Layer) -> LayerReport:
    device = _device(layer.module)
    common = {"name": layer.name, "mixer": type(layer.module).__name__, "device": str(device)}
    binding = layer.binding
    if binding is None:
        return LayerReport(**common, status="original", reason=layer.reason or "not patched")
    try:
        served = binding.backend if device.type == "meta" else resolve_backend(binding.backend, device)
    except RuntimeError:  # moved, since, to where its backend cannot run
        served = f"{binding.backend} (cannot run on {device.type})"
    return LayerReport(
        **common,
        status="fast",
        scope=binding.scope,
        backends=dict.fromkeys(_OPS[binding.scope], served),
        original_calls=original_calls(layer.module),
    )
