"""patch(prefill_chunk_tokens=...): a long call of a model as several that continue its cache, to bound its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from fastmamba.hf.families import Family
from fastmamba.hf.report import PiecesReport

LEAST = 16
"""The smallest `prefill_chunk_tokens`. No piece may be a single token: that would be taken for a decoding step."""

# Arguments that ask for something of the whole call, and the values for which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "labels": (None,),
    "output_hidden_states": (None, False),
    "output_attentions": (None, False),
    "output_router_logits": (None, False),
    "token_type_ids": (None,),
}
_OURS = ("inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep")
_INTEGERS = (torch.int64, torch.int32)

# Beside the models and not on them: neither a pickle nor a deepcopy of a model carries counts.
_calls: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_CUT = "cut"


def in_pieces(own: Callable[..., Any], family: Family, most: int) -> Callable[..., Any]:
    """The forward `own` of a model, with calls of more than `most` tokens cut into pieces of nearly equal length."""

    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        tokens = _length(input_ids, kwargs)
        if tokens <= most or torch.compiler.is_compiling():
            return own(self, input_ids, *args, **kwargs)
        reason = "positional arguments" if args else _why_whole(self, input_ids, tokens, family, kwargs)
        _calls.setdefault(self, Counter())[reason or _CUT] += 1
        if reason:
            return own(self, input_ids, *args, **kwargs)
        return _run(own, self, input_ids, tokens, family, most, kwargs)

    return forward


def pieces_report(root: nn.Module, most: int) -> PiecesReport:
    """How many calls of a model were cut, and which were not, and why."""
    calls = dict(_calls.get(root, ()))
    return PiecesReport(type(root).__name__, most, calls.pop(_CUT, 0), calls)


def forget(root: nn.Module) -> None:
    """Start a model's counts anew."""
    _calls.pop(root, None)


def _length(input_ids: Any, kwargs: dict[str, Any]) -> int:
    embeds = kwargs.get("inputs_embeds")
    if isinstance(input_ids, Tensor) and embeds is None and input_ids.ndim == 2:
        return input_ids.shape[1]
    return embeds.shape[1] if isinstance(embeds, Tensor) and input_ids is None and embeds.ndim == 3 else 0


def _why_whole(root: Any, input_ids: Any, tokens: int, family: Family, kwargs: dict[str, Any]) -> str:
    """Why a long call has to run as it is, or the empty string."""
    if root.training:
        return "training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    config = root.config
    for name, value in kwargs.items():
        if name in _NEUTRAL:
            if not any(value is neutral for neutral in _NEUTRAL[name]):
                return f"argument {name}"
        elif name == "return_dict":
            if value is False:
                return "argument return_dict"
        elif value is not None and name not in _OURS and name != family.cache:
            return f"argument {name}"
    for name in _NEUTRAL:
        if kwargs.get(name) is None and getattr(config, name, False):
            return f"config.{name}"
    if kwargs.get("return_dict") is None and not getattr(config, "return_dict", True):
        return "config.return_dict"

    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= tokens):
        return "argument attention_mask"
    for name, ndim in (("position_ids", 2), ("cache_position", 1)):
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, Tensor) and value.ndim == ndim and value.shape[-1] == tokens):
            return f"argument {name}"
    kept = kwargs.get("logits_to_keep", 0)
    if type(kept) is not int and not (isinstance(kept, Tensor) and kept.ndim == 1 and kept.dtype in _INTEGERS):
        return "argument logits_to_keep"
    cache = kwargs.get(family.cache)
    if cache is not None:
        layers = getattr(cache, "layers", None)
        if layers is None:
            return "unknown kind of cache"
        if any(getattr(layer, "record_past", False) for layer in layers):
            return "the cache records its past"
    return ""


def _run(
    own: Callable[..., Any], root: Any, input_ids: Any, tokens: int, family: Family, most: int, kwargs: dict[str, Any]
) -> Any:
    """The call in pieces. Its output is that of the last one, with all the logits or hidden states asked for."""
    use_cache = kwargs.get("use_cache")
    keeps_cache = root.config.use_cache if use_cache is None else use_cache
    has_head = family.roots[0] == type(root).__name__ or "ForCausalLM" in type(root).__name__
    kept = kwargs.pop("logits_to_keep", 0)
    wanted = _wanted(kept, tokens) if has_head else None
    kwargs["use_cache"] = True
    if family.model == "bamba" and kwargs.get("position_ids") is None:
        # Bamba counts positions from the start of each call, not of the cache.
        device = (input_ids if input_ids is not None else kwargs["inputs_embeds"]).device
        kwargs["position_ids"] = torch.arange(tokens, device=device)[None]
    mask = kwargs.get("attention_mask")
    padded = mask is not None and not bool((mask == 1).all())

    found: list[Tensor] = []
    output: Any = None
    count = -(-tokens // most)
    ends = [tokens * (i + 1) // count for i in range(count)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        piece = _slice(kwargs, start, end, tokens)
        if not padded and input_ids is not None and input_ids.is_cuda:
            piece["attention_mask"] = _causal(root, kwargs.get(family.cache), start, end)
        ids = None if input_ids is None else input_ids[:, start:end]
        if wanted is None:
            output = own(root, ids, **piece)
            found.append(output.last_hidden_state)
        else:
            here = [position - start for position in sorted(set(wanted)) if start <= position < end]
            keep: Any = 1 if not here else len(here)
            if here and here != list(range(end - start - len(here), end - start)):
                keep = torch.tensor(here, device=(ids if ids is not None else piece["inputs_embeds"]).device)
            output = own(root, ids, logits_to_keep=keep, **piece)
            if here:
                found.append(output.logits)
        kwargs[family.cache] = output[family.cache]

    result = torch.cat(found, dim=1)
    name = "last_hidden_state" if wanted is None else "logits"
    if wanted is not None and isinstance(kept, Tensor):
        order = {position: i for i, position in enumerate(sorted(set(wanted)))}
        result = result[:, torch.tensor([order[position] for position in wanted], device=result.device)]
    fields = {key: value for key, value in output.items() if key not in (name, family.cache)}
    if keeps_cache:
        fields[family.cache] = output[family.cache]
    return type(output)(**{name: result}, **fields)


def _wanted(kept: Any, tokens: int) -> list[int]:
    """The positions whose logits a call asks for."""
    if isinstance(kept, int):
        return list(range(tokens))[slice(-kept, None)]
    return [position % tokens for position in kept.tolist()]


def _slice(kwargs: dict[str, Any], start: int, end: int, tokens: int) -> dict[str, Any]:
    """The arguments of a piece. A mask may reach back over what the cache holds."""
    piece = dict(kwargs)
    for name, axis in (("inputs_embeds", 1), ("position_ids", 1), ("cache_position", 0)):
        if piece.get(name) is not None:
            piece[name] = piece[name].narrow(axis, start, end - start)
    mask = piece.get("attention_mask")
    if mask is not None:
        piece["attention_mask"] = mask[:, : mask.shape[1] - tokens + end]
    return piece


def _causal(root: Any, cache: Any, start: int, end: int) -> Any:
    """A causal mask that takes no memory, for models with attention: transformers makes one of T x context entries.

    None where that makes none (a first piece, no attention), or where the model would not take ours.
    """
    body = root.base_model
    if start == 0 and cache is None:
        return None
    kinds = set(getattr(body.config, "layers_block_type", ()) or ())
    if kinds != {"linear_attention", "full_attention"} or body.config._attn_implementation != "sdpa":
        return None
    if not type(body).__module__.startswith("transformers.models.granitemoehybrid."):
        return None
    past = cache.get_seq_length()
    return {"full_attention": causal_lower_right(end - start, past + end - start), "linear_attention": None}
