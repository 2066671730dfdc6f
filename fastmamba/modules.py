"""Reading modules at every call, at little cost: attributes of a `torch.nn.Module` are dear, and so is calling one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_module = nn.modules.module
_CALL = nn.Module.__call__
"""What tracers and profilers put something else in the place of."""


def parameter(module: Any, name: str) -> Any:
    """module.name, where that is most likely a parameter."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def child(module: Any, name: str) -> Any:
    """module.name, where that is most likely a module."""
    found = module._modules.get(name)
    return getattr(module, name) if found is None else found


def is_plain(tensor: Any) -> bool:
    """Whether a kernel may read a weight; one that is quantised or spread over GPUs may be a tensor of its own kind."""
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def is_watched(module: Any, hooks: Any = None) -> bool:
    """Whether somebody has to hear of a call of the module: a hook, of its own or of all modules, or accelerate.

    `hooks`: those of its forward hooks that count, where that is not all.
    """
    return bool(
        (module._forward_hooks if hooks is None else hooks)
        or module._forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or "_hf_hook" in module.__dict__
        or type(module).__call__ is not _CALL
    )


def call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """module(...); straight to its forward where nobody has to hear of it."""
    if is_watched(module) or torch.compiler.is_compiling():
        return module(*args, **kwargs)
    return module.forward(*args, **kwargs)


def call_linear(module: Any, x: Tensor) -> Tensor:
    """module(x); straight to what it computes if it is a linear layer and nothing else.

    Adapters, quantised weights, hooks and offloading live in the call of a module. An nn.Linear that has none of them
    does this.
    """
    if type(module) is nn.Linear and not is_watched(module) and not torch.compiler.is_compiling():
        parameters = module._parameters
        weight = parameters.get("weight")
        if weight is not None and "forward" not in module.__dict__:
            return F.linear(x, weight, parameters.get("bias"))
    return module(x)
