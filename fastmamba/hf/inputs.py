"""What `generate` hands to a model for one more token, at a tenth of the host time that transformers takes for it.

While the host prepares a token the GPU waits, and much of transformers' way is spent on asking for cases that a
one-token call of these models has nothing to do with. The usual call is made here; every other goes there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from fastmamba.hf.families import Family

NAME = "prepare_inputs_for_generation"
_KNOWN = frozenset(("next_sequence_length", "use_cache", "attention_mask", "logits_to_keep", "is_first_iteration"))


def make_prepare(root_class: Any, family: Family) -> Callable[..., Any] | None:
    """A `prepare_inputs_for_generation` for models of a class; None where the class has one that is not known."""
    own: Any = getattr(root_class, NAME, None)
    masked = own is GenerationMixin.prepare_inputs_for_generation
    if not masked and (getattr(own, "__module__", ""), getattr(own, "__qualname__", "")) != (
        "transformers.models.mamba2.modeling_mamba2",
        f"Mamba2ForCausalLM.{NAME}",
    ):
        return None
    cache_name = family.cache
    known = _KNOWN | {cache_name} | ({"position_ids"} if masked else set())

    def one_more(self: Any, ids: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        cache, mask, position_ids = kwargs.get(cache_name), kwargs.get("attention_mask"), kwargs.get("position_ids")
        if (
            kwargs.get("next_sequence_length") != 1
            or kwargs.get("use_cache") is not True
            or kwargs.get("is_first_iteration")
            or cache is None
            or type(ids) is not Tensor
            or ids.ndim != 2
            or not kwargs.keys() <= known
            or ids.device != _first_device(self)
        ):
            return None
        made = {"input_ids": ids[:, -1:].clone(memory_format=torch.contiguous_format), cache_name: cache}
        if masked:
            if getattr(cache, "is_compileable", True) or not all(
                tensor is None or (type(tensor) is Tensor and tensor.ndim == 2) for tensor in (mask, position_ids)
            ):
                return None
            if position_ids is not None:
                if position_ids.shape[-1] != 1:
                    position_ids = position_ids[:, -1:].clone(memory_format=torch.contiguous_format)
                made["position_ids"] = position_ids
            if mask is not None:
                made["attention_mask"] = mask
        else:
            made["attention_mask"] = None
        made["use_cache"] = True
        if "logits_to_keep" in kwargs:
            made["logits_to_keep"] = kwargs["logits_to_keep"]
        return made

    @functools.wraps(own)  # generate() reads the signature
    def prepare_inputs_for_generation(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        current = getattr(type(self), NAME)
        if current is own and not args and type(self)._auto_class is None:
            made = one_more(self, input_ids, kwargs)
            if made is not None:
                return made
        return current(self, input_ids, *args, **kwargs)

    # How a bound method is pickled: as getattr(model, this name), the class's own when loaded.
    prepare_inputs_for_generation.__qualname__ = NAME
    return prepare_inputs_for_generation


def _first_device(module: nn.Module) -> torch.device | None:
    """The device of a model's first parameter, which transformers takes for the model's."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter.device
    for child in module._modules.values():
        if child is not None and (device := _first_device(child)) is not None:
            return device
    return None
