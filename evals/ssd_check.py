"""Errors of SSD outputs against float64, over any length: the oracle runs in pieces and hands its state on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmamba.testing import SsdCase, relative_error

PIECE = 1 << 27  # elements of x; 16K tokens of 128 heads, about 1 GiB of each float64 tensor


def cut(case: SsdCase, part: slice, initial_states: Tensor | None) -> SsdCase:
    """Some of a case's tokens, starting from given states."""
    return dataclasses.replace(
        case,
        x=case.x[:, part],
        dt=case.dt[:, part],
        B=case.B[:, part],
        C=case.C[:, part],
        z=None if case.z is None else case.z[:, part],
        initial_states=initial_states,
    )


def oracle_pieces(case: SsdCase) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(tokens, y, states after them) in float64, one piece of the sequence after the other."""
    tokens = case.x.shape[1]
    length = max(64, PIECE // (case.x[:, 0].numel() * 64) * 64)
    states = case.initial_states
    for first in range(0, tokens, length):
        part = slice(first, min(first + length, tokens))
        y, states = cut(case, part, states).oracle()
        yield part, y, states


def errors(case: SsdCase, results: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """||y - oracle|| / ||oracle||, and the same of the final states, of several results at once; NaN if anything is."""
    off, norm = [0.0] * len(results), 0.0
    final = case.A
    for part, y, states in oracle_pieces(case):
        final = states
        norm += y.square().sum().item()
        for i, (found, _) in enumerate(results):
            off[i] += (found[:, part].double() - y).square().sum().item()
    return [
        ((square / norm) ** 0.5, relative_error(states, final))
        for square, (_, states) in zip(off, results, strict=True)
    ]


def allowed(case: SsdCase, tokens: int = 256, factor: float = 2.0) -> tuple[float, float]:
    """How far y and the states may be off: a factor of what the token-by-token recurrence in the dtype of x errs.

    Measured on the first tokens of the case. One rounding of the result is always allowed.
    """
    start = cut(case, slice(0, tokens), case.initial_states)
    (oracle, states), (y, final) = start.oracle(), start.plain()
    rounding = torch.finfo(case.x.dtype).eps / 2
    return (
        factor * max(rounding, relative_error(y, oracle)),
        factor * max(rounding, relative_error(final, states)),
    )
