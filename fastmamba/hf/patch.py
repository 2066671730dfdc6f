"""Put the fast forward on a model's mixers, take it off again, and say what was done."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmamba.hf.binding import Binding, bind, binding_in, bindings, restore, slot_of, why_alone
from fastmamba.hf.block import bind_blocks, block_backend, block_report, layer_of, unbind_blocks
from fastmamba.hf.families import FAMILIES, Family, belongs, match, match_root
from fastmamba.hf.report import GraphReport, LayerReport, PiecesReport, Report, forget_calls, original_calls
from fastmamba.ops import BACKENDS, PRECISIONS, resolve_backend, ssd_variant

SCOPES = ("block", "mixer", "ssd")
"""What patch() may make fast: the mixer and the layer around it, the mixer alone, or the scan alone."""

CUDA_GRAPHS = ("auto", "off")
"""Whether one-token calls may come from CUDA graphs."""

_KERNEL_SIZE = 256
"""The largest P and N of the Triton kernels."""

_MIXER_OPS = ("causal_conv1d", "ssd", "ssd_step", "gated_rms_norm")
_OPS = {"block": (*_MIXER_OPS, "add_rms_norm"), "mixer": _MIXER_OPS, "ssd": ("ssd",)}


@dataclass(frozen=True)
class _Layer:
    """A mixer found in a model."""

    name: str
    module: Any
    family: Family
    slot: str
    """The key of module.__dict__ that holds its forward."""
    binding: Binding | None
    """Of the fast forward that is bound now."""
    reason: str
    """Why the layer has to be left alone, or the empty string."""


def patch(
    model: nn.Module,
    *,
    scope: str = "block",
    backend: str = "auto",
    precision: str = "exact",
    state_dtype: torch.dtype | None = None,
    prefill_chunk_tokens: int | None = None,
    cuda_graphs: str = "auto",
) -> Report:
    """Make the Mamba-2 layers of a loaded transformers model fast, in place, on this instance alone.

    Each mixer gets a forward of its own. Class, state_dict, hooks and modules stay as they are; `unpatch` takes the
    forward off again; patching again re-binds with the new options. A call that the fast forward does not cover
    (gradients, training mode, packed sequences, an unknown cache) runs the original one, and `report` counts it.

    A deepcopy of a patched model is patched. A pickled one loads unpatched, also where fastmamba is not installed.

    Args:
        model: a transformers model of a supported family, or a module that holds one (PEFT's wrapper, say).
        scope: "block" replaces the mixers' forward, and in Mamba2 and GraniteMoeHybrid those of the layers around them:
            norms, residual adds, the gate of the multilayer perceptron and, where Triton serves, the experts
            (attention stays as it is).
            "mixer" replaces the mixers' forward; "ssd" only the scan over a sequence inside the original one.
        backend: "triton", "torch", or "auto": Triton on a GPU, PyTorch anywhere else.
        precision: "exact" keeps in float32 what mamba_ssm's kernels keep in float32; "relaxed" lets the scan's Triton
            kernels multiply decays and scores in the dtype of the activations. See `fastmamba.ops.ssd`.
        state_dtype: dtype in which the scan's Triton kernels hand states from one part of a sequence to the next:
            torch.float32, or the model's own, which is less memory and less accurate. None is float32. The cached state
            is float32 in any case.
        prefill_chunk_tokens: the most tokens that a call of the model takes at once, at least 16; a longer one runs in
            pieces that continue the cache, with the same outputs and less memory. Calls that ask for what only a whole
            call has (all hidden states, a loss) run whole, and `report` counts them by reason. None never cuts.
        cuda_graphs: "auto" records the model's one-token forward on its first use, on a GPU, and replays it from then
            on; attention layers stay out of the graphs. Calls that cannot be replayed run as without graphs, and
            `report` counts them by reason. "off" records nothing.

    Returns:
        What each layer got, or why it was left alone.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown `scope`, `backend`, `precision` or `cuda_graphs`; a `state_dtype` that is neither float32
            nor the model's; a `prefill_chunk_tokens` that is too small or for a model that cannot be cut; a model of no
            supported family.
        RuntimeError: an unsupported transformers version; backend="triton" where it cannot run.
    """
    _check_options(scope, backend, precision, cuda_graphs)
    layers = _survey(model)
    _check_pieces(model, prefill_chunk_tokens)
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
            _check_state_dtype(layer.module, state_dtype)
            bound.append((layer, _make_forward(layer, scope, backend, precision, state_dtype, made)))
    for layer, function in bound:
        bind(layer.module, layer.slot, function)
        forget_calls(layer.module)
    if layers:
        _unbind_roots(model)
        unbind_blocks(model)
        if scope == "block":
            bind_blocks(model, backend)
        _bind_roots(model, scope, cuda_graphs == "auto" and scope != "ssd", prefill_chunk_tokens)
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
        unbind_blocks(model)
    for layer in layers:
        if layer.binding is not None:
            restore(layer.module, layer.slot, layer.binding)
            forget_calls(layer.module)
            count += 1
    return count


@contextmanager
def patched(
    model: nn.Module,
    *,
    scope: str = "block",
    backend: str = "auto",
    precision: str = "exact",
    state_dtype: torch.dtype | None = None,
    prefill_chunk_tokens: int | None = None,
    cuda_graphs: str = "auto",
) -> Iterator[Report]:
    """`patch` a model for the length of a with block; afterwards each layer has the forward it had before."""
    before = {id(layer.module): layer.module.__dict__[layer.slot] for layer in _survey(model) if layer.binding}
    roots = [(root, slot, bound.__func__) for root, slot, bound in _bound_roots(model)] if before else []
    blocks = block_backend(model)
    yielded = patch(
        model,
        scope=scope,
        backend=backend,
        precision=precision,
        state_dtype=state_dtype,
        prefill_chunk_tokens=prefill_chunk_tokens,
        cuda_graphs=cuda_graphs,
    )
    try:
        yield yielded
    finally:
        _unbind_roots(model)
        unbind_blocks(model)
        if blocks is not None:
            bind_blocks(model, blocks)
        for root, slot, function in roots:
            bind(root, slot, function)
        for layer in _survey(model):
            if layer.binding is None:
                continue
            earlier = before.get(id(layer.module))
            if earlier is None:
                restore(layer.module, layer.slot, layer.binding)
            else:
                bind(layer.module, layer.slot, earlier.__func__)


def report(model: nn.Module) -> Report:
    """Say of each mixer layer of a model whether it is fast, on what backend, and if not, why.

    Raises:
        TypeError: `model` is not a module.
    """
    layers = _survey(model)
    note = "" if layers else "The model has no Mamba-2 layer: there is nothing to patch."
    graphs, cut = _root_reports(model) if layers else ((), ())
    around = layer_of(model)
    described = tuple(_describe(layer, layer.module in around) for layer in layers)
    return Report(type(model).__name__, described, note, graphs, block_report(model) if around else None, cut)


def binding_of(module: Any) -> Binding | None:
    """What a mixer's fast forward was made with; None where it runs another."""
    for slot in ("_old_forward", "forward"):
        function = getattr(module.__dict__.get(slot), "__func__", None)
        if isinstance(function, types.FunctionType) and function in bindings:
            return bindings[function]
    return None


def _roots(model: nn.Module) -> Iterator[tuple[Any, Family]]:
    """The models whose one-token forward may come from a graph, each the outermost: one with a head, not its body."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        family = match_root(module)
        if family is not None and module not in inside:
            inside.update(module.modules())
            yield module, family


def _bind_roots(model: nn.Module, scope: str, tapes: bool, most: int | None) -> None:
    from fastmamba.hf.graphs import make_forward, own_stood, remember
    from fastmamba.hf.inputs import NAME, make_prepare

    for root, family in _roots(model):
        slot = slot_of(root)
        own = types.MethodType(type(root).forward, root)
        # A forward that something else has put there is left alone. Under accelerate's hooks nothing is recorded, and
        # the report says so.
        if root.__dict__.get(slot, own) == own and (tapes or most is not None or (family.attention and scope != "ssd")):
            function = make_forward(type(root), family, tapes, most)
            if slot in root.__dict__:
                own_stood.add(function)
            bind(root, slot, function)
            prepare = make_prepare(type(root), family) if tapes else None
            if prepare is not None and root.__dict__.get(NAME) in (None, getattr(type(root), NAME).__get__(root)):
                remember(prepare)
                if NAME in root.__dict__:
                    own_stood.add(prepare)
                bind(root, NAME, prepare)


def _bound_roots(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """The models whose forward is one of `make_forward`, the key of __dict__ that holds it, and it.

    And what prepares their inputs, under its own name.
    """
    from fastmamba.hf.graphs import made
    from fastmamba.hf.inputs import NAME

    for root, _ in _roots(model):
        for slot in ("_old_forward", "forward", NAME):
            bound = root.__dict__.get(slot)
            if made(getattr(bound, "__func__", None)) is not None:
                yield root, slot, bound


def _unbind_roots(model: nn.Module) -> None:
    from fastmamba.hf import graphs, pieces

    for root, slot, bound in list(_bound_roots(model)):
        graphs.forget(root)
        pieces.forget(root)
        if slot != "_old_forward" and bound.__func__ not in graphs.own_stood:
            del root.__dict__[slot]
            continue
        name = "forward" if slot == "_old_forward" else slot
        own = root.__dict__[slot] = types.MethodType(getattr(type(root), name), root)
        wrapper = root.__dict__.get("forward")
        if getattr(wrapper, "__wrapped__", None) == bound:  # accelerate's wrapper, made while ours was bound
            functools.update_wrapper(wrapper, own)


def _root_reports(model: nn.Module) -> tuple[tuple[GraphReport, ...], tuple[PiecesReport, ...]]:
    from fastmamba.hf import graphs, pieces

    replayed, cut = [], []
    for root, _, bound in _bound_roots(model):
        tapes, most = graphs.made(bound.__func__) or (False, None)
        if tapes:
            session = graphs.session_of(root)
            replayed.append(GraphReport(type(root).__name__) if session is None else session.report())
        if most is not None:
            cut.append(pieces.pieces_report(root, most))
    return tuple(replayed), tuple(cut)


def _check_options(scope: object, backend: object, precision: object, cuda_graphs: object) -> None:
    options = (
        ("scope", scope, SCOPES),
        ("backend", backend, BACKENDS),
        ("precision", precision, PRECISIONS),
        ("cuda_graphs", cuda_graphs, CUDA_GRAPHS),
    )
    for name, value, allowed in options:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_state_dtype(module: Any, state_dtype: object) -> None:
    own = module.conv1d.weight.dtype
    if state_dtype not in (None, torch.float32, own):
        raise ValueError(f"state_dtype must be None, torch.float32 or the model's {own}, got {state_dtype!r}")


def _check_pieces(model: nn.Module, tokens: object) -> None:
    from fastmamba.hf.pieces import LEAST

    if tokens is None:
        return
    if type(tokens) is not int or tokens < LEAST:
        raise ValueError(f"prefill_chunk_tokens must be an integer of at least {LEAST}, or None, got {tokens!r}")
    if not any(True for _ in _roots(model)):
        raise ValueError(f"prefill_chunk_tokens cannot be used with {type(model).__name__}: it has no model to cut for")


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
        slot = slot_of(module)
        binding = binding_in(module, slot)
        reason = ""
        if binding is None:
            reason = why_alone(module, cls, module.__dict__.get(slot))
            if not reason and module.activation not in ("silu", "swish"):
                reason = f"activation {module.activation!r} is not covered"
        layers.append(_Layer(name, module, family, slot, binding, reason))
    return layers


def _make_forward(
    layer: _Layer,
    scope: str,
    backend: str,
    precision: str,
    state_dtype: torch.dtype | None,
    made: dict[Any, Any],
) -> types.FunctionType:
    """A forward for a layer. Layers that need the same one share it."""
    from fastmamba.hf import compat, forward
    from fastmamba.mixer import MixerPlan

    module = layer.module
    stood = layer.binding.stood if layer.binding is not None else layer.slot in module.__dict__
    # Whether the layer around it is fast too is that layer's affair.
    around = "ssd" if scope == "ssd" else "mixer"
    binding = Binding(around, _check_backend(module, backend), stood, precision, state_dtype)
    key: Any
    if scope != "ssd":
        plan = MixerPlan(
            backend=binding.backend,
            in_scale=layer.family.in_scale,
            projection_scale=layer.family.projection_scale,
            precision=precision,
            state_dtype=state_dtype,
            **compat.norm_plan(module),
        )
        key = (binding, plan)
        make = functools.partial(forward.mixer_scope, plan)
    else:
        key = (binding, type(module))
        make = functools.partial(forward.ssd_scope, type(module), binding.backend, precision, state_dtype)
    if key not in made:
        made[key] = make()
        bindings[made[key]] = binding
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


def _describe(layer: _Layer, in_block: bool) -> LayerReport:
    device = _device(layer.module)
    common = {"name": layer.name, "mixer": type(layer.module).__name__, "device": str(device)}
    binding = layer.binding
    if binding is None:
        return LayerReport(**common, status="original", reason=layer.reason or "not patched")
    try:
        served = binding.backend if device.type == "meta" else resolve_backend(binding.backend, device)
    except RuntimeError:  # moved, since, to where its backend cannot run
        served = f"{binding.backend} (cannot run on {device.type})"
    scope = "block" if in_block else binding.scope
    variant = ""
    if served == "triton" and device.type != "meta":
        module = layer.module
        variant = ssd_variant(device, module.conv1d.weight.dtype, module.head_dim, module.ssm_state_size)
    return LayerReport(
        **common,
        status="fast",
        scope=scope,
        backends=dict.fromkeys(_OPS[scope], served),
        ssd_variant=variant,
        precision=binding.precision,
        original_calls=original_calls(layer.module),
    )
