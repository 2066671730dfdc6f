"""How far a model's next-token distributions are from the original's in float32, position by position on one long text.

Three ways through the text, since each runs other code: the whole of it in one call; in pieces that continue a cache;
and, for the last tokens, one at a time. The original takes a long text in pieces of its own, because without optional
kernels its memory grows with the square of a call's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCKS = 16
"""Into how many parts of equal length the positions are cut."""
STEPS = 64
"""Tokens taken one at a time."""
MOST_POSITIONS = 16384
"""Positions compared at most, evenly spread: the logits of more would not fit."""
WAYS = ("one call", "pieces", "steps")
Advance = Callable[[int], object]
"""Told of every so many tokens that are done."""


@dataclass(frozen=True)
class Drift:
    """Divergence from the reference at the compared positions of one way through the text."""

    positions: np.ndarray
    kl: np.ndarray
    """KL(reference || this), in nats."""
    top1: np.ndarray
    """Whether both find the same token likeliest."""
    loss: float
    """Mean negative log likelihood of the text, in nats a token."""

    def blocks(self, tokens: int) -> list[dict[str, float]]:
        """Means by part of the text."""
        edges = np.linspace(0, tokens, BLOCKS + 1)
        found = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (self.positions >= low) & (self.positions < high)
            if inside.any():
                found.append(
                    {
                        "from": int(low),
                        "to": int(high),
                        "kl": float(self.kl[inside].mean()),
                        "top-1 agreement": float(self.top1[inside].mean()),
                    }
                )
        return found

    def summary(self, tokens: int) -> dict[str, Any]:
        return {
            "positions": len(self.kl),
            "kl": float(self.kl.mean()),
            "kl p99": float(np.quantile(self.kl, 0.99)),
            "kl max": float(self.kl.max()),
            "top-1 agreement": float(self.top1.mean()),
            "nats a token": self.loss,
            "by position": self.blocks(tokens),
        }


def positions(tokens: int) -> Tensor:
    """The positions that are compared; the last one predicts a token that is not there."""
    count = min(tokens - 1, MOST_POSITIONS)
    return torch.linspace(0, tokens - 2, count, dtype=torch.float64).round().long()


def cuts(tokens: int) -> list[int]:
    """Where the text is cut into pieces: at odd places, never at a chunk's end; the last STEPS tokens go one by one."""
    last = tokens - STEPS
    return sorted({min(max(1, part), last) for part in (101, int(0.37 * tokens) | 1, int(0.71 * tokens) | 1, last)})


def work(tokens: int, ways: tuple[str, ...] = WAYS) -> int:
    """How many tokens go through a model in `Reference.drift`."""
    return tokens * ("one call" in ways) + (tokens - 1) * ("pieces" in ways)


def _cache_name(model: Any) -> str:
    return "cache_params" if type(model).__name__.startswith("Mamba2") else "past_key_values"


@torch.no_grad()
def one_call(model: Any, ids: Tensor, longest: int | None, advance: Advance) -> Tensor:
    """Logits [n, V] at `positions` of tokens (1, T) in one call without a cache, or in pieces of at most `longest`."""
    tokens = ids.shape[1]
    if longest is not None and tokens > longest:
        edges = [*range(0, tokens, longest), tokens]
        return torch.cat([logits for _, logits, _ in _pieces(model, ids, edges, advance)])
    keep = positions(tokens).to(ids.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
    advance(tokens)
    return logits


def _pieces(model: Any, ids: Tensor, edges: list[int], advance: Advance) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """(positions, logits at them, cache) of one piece after the other."""
    name, cache = _cache_name(model), None
    wanted = positions(ids.shape[1])
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        here = wanted[(wanted >= start) & (wanted < stop)]
        if len(here) == 0:
            here = torch.tensor([stop - 1])
        output = model(
            input_ids=ids[:, start:stop],
            use_cache=True,
            logits_to_keep=(here - start).to(ids.device),
            **({} if cache is None else {name: cache}),
        )
        cache = getattr(output, name)
        advance(stop - start)
        yield here, output.logits[0], cache


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, longest: int | None, advance: Advance) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(way, positions, logits at them) of the pieces and then of the single tokens, through one cache."""
    name, tokens = _cache_name(model), ids.shape[1]
    cache: Any = None
    edges = {0, *cuts(tokens), *(range(longest, tokens - STEPS, longest) if longest else ())}
    for where, logits, newest in _pieces(model, ids, sorted(edges), advance):
        cache = newest
        yield "pieces", where, logits
    stepped = []
    for index in range(tokens - STEPS, tokens - 1):
        stepped.append(model(input_ids=ids[:, index : index + 1], use_cache=True, **{name: cache}).logits[0])
        advance(1)
    yield "steps", torch.arange(tokens - STEPS, tokens - 1), torch.cat(stepped)


class Reference:
    """The original's distributions in float32, and the text they are of."""

    def __init__(self, model: Any, ids: Tensor, longest: int, advance: Advance) -> None:
        self.ids = ids
        self.longest = longest
        """How many tokens the original gets at most in one call."""
        self.positions = positions(ids.shape[1])
        self.logits = one_call(model, ids, longest, advance).float()
        self.index = {int(position): i for i, position in enumerate(self.positions)}
        self.loss = self.measure(self.positions, self.logits).loss

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def measure(self, where: Tensor, logits: Tensor) -> Drift:
        """Compare logits [n, V] at positions `where`; those that the reference lacks are left out."""
        pairs = [(i, self.index[int(p)]) for i, p in enumerate(where) if int(p) in self.index]
        own = torch.tensor([i for i, _ in pairs], device=logits.device)
        other = torch.tensor([i for _, i in pairs], device=logits.device)
        kls, tops, losses = [], [], []
        targets = self.ids[0, 1:].to(logits.device)[where.to(logits.device)[own]]
        for piece in torch.arange(len(own), device=logits.device).split(1024):  # float64 of a large vocabulary is large
            p = self.logits[other[piece]].double().log_softmax(-1)
            q = logits[own[piece]].double().log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum(-1))
            tops.append(p.argmax(-1) == q.argmax(-1))
            losses.append(-q.gather(-1, targets[piece, None])[:, 0])
        return Drift(
            positions=where[own.cpu()].numpy(),
            kl=torch.cat(kls).clamp(min=0).cpu().numpy(),
            top1=torch.cat(tops).cpu().numpy(),
            loss=torch.cat(losses).mean().item(),
        )

    def drift(
        self, model: Any, ways: tuple[str, ...] = WAYS, *, original: bool = False, advance: Advance
    ) -> Iterator[tuple[str, Drift]]:
        """Measure a model as it is now, way by way."""
        longest = self.longest if original else None
        if "one call" in ways:
            yield "one call", self.measure(self.positions, one_call(model, self.ids, longest, advance))
        if "pieces" in ways:
            parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for way, where, logits in in_pieces(model, self.ids, longest, advance):
                parts.setdefault(way, []).append((where, logits))
            for way, found in parts.items():
                yield way, self.measure(torch.cat([w for w, _ in found]), torch.cat([x for _, x in found]))
