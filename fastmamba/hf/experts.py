"""A mixture of experts as one op: where that can take the place of what transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmamba.hf.block import is_silu
from fastmamba.hf.compat import hooks_now
from fastmamba.hf.report import GRADIENTS
from fastmamba.modules import child, is_plain, is_watched, parameter
from fastmamba.ops import moe, resolve_backend

_PLAIN_WAYS = (None, "eager", "batched_mm", "grouped_mm")
"""Ways to compute experts that mean no more than to compute them; one that the user has registered is called."""

HOOKS = "hooks on experts, or a forward of their own"
KIND = "experts of another kind"
WAY = "experts_implementation"
FORM = "weights of experts in another form than hidden_states"
AUTOCAST = "autocast"

_MODULE = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def serves(backend: str, x: Tensor) -> bool:
    """Whether experts are computed by kernels of ours: in plain PyTorch transformers' own ways are as good."""
    return resolve_backend(backend, x.device) == "triton"


def why_not(mixture: Any, x: Tensor) -> str | None:
    """Why the router and experts of a GraniteMoeHybridMoE have to be called as modules, or None."""
    router, experts = child(mixture, "router"), child(mixture, "experts")
    for module, name in ((router, "GraniteMoeHybridTopKRouter"), (experts, "GraniteMoeHybridExperts")):
        cls = type(module)
        if cls.__qualname__ != name or cls.__module__ != _MODULE:
            return KIND
        if "forward" in module.__dict__ or is_watched(module) and _is_heard(module):
            return HOOKS
    activation = child(experts, "act_fn")
    if not is_silu(activation) or getattr(experts, "_is_expert_parallel", False):
        return KIND
    if is_watched(activation):
        return HOOKS
    if _way(experts.config) not in _PLAIN_WAYS:
        return WAY
    if torch.is_autocast_enabled(x.device.type):
        return AUTOCAST
    if x.dtype not in _DTYPES:
        return FORM
    form = x.dtype, x.device
    for weight in _weights(router, experts):
        if not is_plain(weight) or (weight.dtype, weight.device) != form or not weight.is_contiguous():
            return FORM
        if weight.requires_grad and torch.is_grad_enabled():
            return GRADIENTS
    return None


def _is_heard(module: Any) -> bool:
    """Whether a router or experts that are watched are so now, and not for outputs that some other call asked for."""
    return torch.compiler.is_compiling() or is_watched(module, hooks_now(module))


def _way(config: Any) -> Any:
    """config._experts_implementation, past the properties of a configuration, which are slow."""
    if torch.compiler.is_compiling():
        return config._experts_implementation
    found = object.__getattribute__(config, "__dict__").get("_experts_implementation_internal", config)
    return config._experts_implementation if found is config else found


def mix(mixture: Any, x: Tensor, add: Tensor | None, backend: str) -> Tensor:
    """What a GraniteMoeHybridMoE returns for x (B, T, hidden size), where `why_not` finds nothing; plus `add`."""
    router = child(mixture, "router")
    return moe(x, *_weights(router, child(mixture, "experts")), top_k=router.top_k, add=add, backend=backend)


def _weights(router: Any, experts: Any) -> tuple[Any, Any, Any]:
    return parameter(router, "weight"), parameter(experts, "gate_up_proj"), parameter(experts, "down_proj")
