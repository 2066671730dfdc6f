"""Do patched and original agree? Logits at positions spread over a prompt, and the hidden states behind them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from evals.ssd_contenders import autotuners

# Where a float32 run can judge both: patched may err this many times what the original errs against it.
ERROR_RATIO = 2.0
CHECKED_POSITIONS = 64


def _positions(ids: torch.Tensor) -> torch.Tensor:
    tokens = ids.shape[1]
    return torch.linspace(0, tokens - 1, min(CHECKED_POSITIONS, tokens), device=ids.device).round().long().unique()


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """mamba_ssm's kernels in one form each: where only numbers count, a minute of tuning is lost."""
    if not torch.cuda.is_available():
        yield
        return
    kept = [(tuner, tuner.configs) for tuner in autotuners()]
    for tuner, configs in kept:
        tuner.configs = [min(configs, key=lambda config: math.prod(config.kwargs.values()) * config.num_stages)]
    try:
        yield
    finally:
        for tuner, configs in kept:
            tuner.configs = configs


def final_hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the last norm gives, at positions spread over the prompt: float32 (B, positions, hidden size)."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, _positions(ids)].float()


def checked_logits(model: PreTrainedModel, ids: torch.Tensor, segment: int) -> torch.Tensor:
    """Float32 logits at positions spread over the prompt, and of one token decoded from the cache it leaves.

    The last one fails where the prefill hands on a wrong state. Shape (B, positions + 1, vocabulary).
    """
    tokens = ids.shape[1]
    positions = _positions(ids)
    cache: dict[str, Any] = {}
    found = []
    for start in range(0, tokens, segment):
        piece = ids[:, start : start + segment]
        wanted = positions[(positions >= start) & (positions < start + segment)] - start
        output = model(input_ids=piece, use_cache=True, logits_to_keep=wanted if wanted.numel() else 1, **cache)
        if wanted.numel():
            found.append(output.logits.float())
        cache = {name: output[name] for name in ("cache_params", "past_key_values") if output.get(name) is not None}
    found.append(model(input_ids=ids[:, :1], use_cache=True, **cache).logits.float())
    return torch.cat(found, dim=1)


def compare(
    patched: torch.Tensor, original: torch.Tensor, reference: torch.Tensor | None, bound: float
) -> dict[str, Any]:
    """Do the two agree? Against a float32 reference where there is one, else by how far they differ."""
    result: dict[str, Any] = {"difference": relative_error(patched, original), "positions": patched.shape[1]}
    if reference is None:
        result |= {"against": "original", "limit": bound}
        error = result["difference"]
    else:
        result["original_error"] = relative_error(original, reference)
        error = result["patched_error"] = relative_error(patched, reference)
        result |= {"against": "original in float32", "limit": ERROR_RATIO * result["original_error"] + 1e-6}
    result["passed"] = bool(error <= result["limit"]) and bool(torch.isfinite(patched).all())
    return result


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
