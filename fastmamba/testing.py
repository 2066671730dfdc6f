"""Inputs and comparisons that tests and evals share. The library itself never imports this module."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmamba.reference.recurrence import ssd_recurrence
from fastmamba.reference.ssd import ssd as reference_ssd


@dataclass
class SsdCase:
    """Arguments of `fastmamba.ops.ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    dt_bias: Tensor | None = None
    initial_states: Tensor | None = None
    dt_softplus: bool = True
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments: tensors, or None where nothing is given."""
        return (self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial_states)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments, with the final states asked for."""
        return {
            "dt_softplus": self.dt_softplus,
            "dt_limit": self.dt_limit,
            "return_final_states": True,
            "chunk_size": self.chunk_size,
            **self.options,
        }

    def to(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The positional arguments, all in `dtype`."""
        return tuple(None if t is None else t.to(dtype) for t in self.arguments())

    def oracle(self, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
        """y and the final states in float64, by the chunked PyTorch implementation."""
        rest: tuple[Any, ...] = (self.dt_softplus, *self.dt_limit, chunk_size)
        return reference_ssd(*self.to(torch.float64), *rest)

    def plain(self) -> tuple[Tensor, Tensor]:
        """The same by the token-by-token recurrence, every tensor in the dtype of x: what the dtype itself costs."""
        rest: tuple[Any, ...] = (self.dt_softplus, *self.dt_limit, self.x.dtype)
        return ssd_recurrence(*self.arguments(), *rest)

    def __str__(self) -> str:
        b, t, h, p = self.x.shape
        given = [name for name in ("D", "z", "dt_bias", "initial_states") if getattr(self, name) is not None]
        return (
            f"B={b} T={t} H={h} P={p} G={self.B.shape[2]} N={self.B.shape[3]} {self.x.dtype} chunk={self.chunk_size} "
            f"softplus={self.dt_softplus} dt_limit={self.dt_limit} with {', '.join(given) or 'nothing else'}"
        )


def ssd_case(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    per_channel_d: bool = False,
    skip: bool = True,
    gate: bool = False,
    bias: bool = True,
    initial: bool = False,
    **options: Any,
) -> SsdCase:
    """Make a case as Transformers gives it: x, B, C are views of one convolution's output, z and dt of one projection.

    dt_bias and A are drawn as Mamba-2 initialises them: dt log-uniform in (0.001, 0.1), A uniform in (-16, -1).

    Args:
        batch, tokens, heads, head_dim, groups, state: B, T, H, P, G, N.
        dtype: of x, B, C, z and dt; the small parameters are float32.
        device: where.
        seed: of the random numbers.
        per_channel_d: D of shape (H, P) instead of (H,).
        skip, gate, bias, initial: whether D, z, dt_bias, initial_states are given.
        options: further fields of `SsdCase`.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(heads, device=device, generator=generator) * (high - low) + low

    inner = heads * head_dim
    conv = normal(batch, tokens, inner + 2 * groups * state).to(dtype)
    x, B, C = conv.split((inner, groups * state, groups * state), dim=-1)
    projected = normal(batch, tokens, 2 * inner + 2 * groups * state + heads).to(dtype)
    dt = uniform(math.log(1e-3), math.log(1e-1)).exp()
    return SsdCase(
        x=x.view(batch, tokens, heads, head_dim),
        dt=projected[..., -heads:],
        A=-uniform(1.0, 16.0),
        B=B.view(batch, tokens, groups, state),
        C=C.view(batch, tokens, groups, state),
        D=(normal(heads, head_dim) if per_channel_d else normal(heads)) if skip else None,
        z=projected[..., :inner].view(batch, tokens, heads, head_dim) if gate else None,
        dt_bias=dt + torch.log(-torch.expm1(-dt)) if bias else None,  # the inverse of softplus
        initial_states=normal(batch, heads, head_dim, state) if initial else None,
        **options,
    )


def random_ssd_case(seed: int, *, device: torch.device | str = "cpu", small: bool = False) -> SsdCase:
    """Draw a case over everything that the op accepts; `small` ones take Triton's interpreter seconds."""
    draw = random.Random(seed)
    sizes = (16, 24, 32, 48) if small else (16, 24, 32, 48, 64, 80, 96, 128, 160, 256)
    groups = draw.choice((1, 1, 2, 3))
    softplus = draw.random() < 0.8
    return ssd_case(
        batch=draw.choice((1, 1, 2, 3)),
        tokens=draw.choice((1, 2, 15, 16, 17, 33, 64, 100))
        if small
        else draw.choice((1, 2, 31, 64, 65, 200, 511, 1000)),
        heads=groups * draw.choice((1, 2) if small else (1, 2, 3, 8)),
        head_dim=draw.choice(sizes),
        groups=groups,
        state=draw.choice(sizes),
        dtype=draw.choice((torch.float32, torch.float16, torch.bfloat16)),
        device=device,
        seed=seed,
        per_channel_d=draw.random() < 0.3,
        skip=draw.random() < 0.7,
        gate=draw.random() < 0.4,
        bias=draw.random() < 0.8,
        initial=draw.random() < 0.5,
        dt_softplus=softplus,
        dt_limit=draw.choice(((0.0, math.inf), (0.0, math.inf), (0.01, 0.1), (0.001, math.inf))),
        chunk_size=draw.choice((None, 16, 32)) if small else draw.choice((None, None, 32, 64, 128)),
    )


def relative_error(actual: Tensor, oracle: Tensor) -> float:
    """||actual - oracle|| / ||oracle||, in float64 (the Frobenius norm); NaN if anything in `actual` is."""
    oracle = oracle.to(torch.float64)
    return ((actual.to(torch.float64) - oracle).norm() / oracle.norm().clamp_min(1e-300)).item()


def assert_golden(actual: Tensor, plain: Tensor, oracle: Tensor, factor: float = 2.0, what: object = "") -> float:
    """Check a result against the float64 oracle: its error is at most `factor` times that of plain PyTorch.

    Where plain PyTorch happens to be exact, as for a single product, one rounding of the result is allowed.

    Returns:
        The error over plain PyTorch's.

    Raises:
        AssertionError: with both errors; NaN never passes.
    """
    error, allowed = relative_error(actual, oracle), relative_error(plain, oracle)
    allowed = max(allowed, torch.finfo(actual.dtype).eps / 2)
    if not error <= factor * allowed:
        raise AssertionError(
            f"{what}: error {error:.3e} against float64, plain {plain.dtype} PyTorch errs {allowed:.3e}"
        )
    return error / allowed
