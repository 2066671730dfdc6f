"""Shapes that the SSD is measured on, and the least that each of them costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmamba.testing import SsdCase, ssd_case

K = 1024


@dataclass(frozen=True)
class Shape:
    """One call: B, T, H, P, G, N."""

    model: str
    batch: int
    tokens: int
    heads: int
    head_dim: int = 64
    groups: int = 1
    state: int = 128

    def case(self, dtype: torch.dtype, device: torch.device, seed: int = 0, **options: object) -> SsdCase:
        """Inputs as Transformers gives them: views of one convolution's output and of one projection."""
        size = (self.batch, self.tokens, self.heads, self.head_dim, self.groups, self.state)
        return ssd_case(*size, dtype=dtype, device=device, seed=seed, options=dict(options))

    def bytes(self, dtype: torch.dtype) -> int:
        """Device memory traffic with everything read or written once: x, B, C, dt, y and the final states."""
        tokens, scans = self.batch * self.tokens, self.batch * self.heads
        activations = 2 * self.heads * self.head_dim + 2 * self.groups * self.state + self.heads
        return tokens * activations * dtype.itemsize + scans * self.head_dim * self.state * 4

    def flops(self, chunk: int = 64) -> int:
        """Operations of the matrix products at a chunk size: C.B once per group, scores.x, and the state in and out."""
        per_head = 2 * chunk * self.head_dim + 4 * self.head_dim * self.state
        return self.batch * self.tokens * (self.heads * per_head + self.groups * 2 * chunk * self.state)

    @property
    def label(self) -> str:
        head = f"{self.heads} x {self.head_dim}, N {self.state}, G {self.groups}"
        return f"{self.model} ({head}{f', batch {self.batch}' if self.batch > 1 else ''})"


def _lengths(model: str, lengths: tuple[int, ...], heads: int, **rest: int) -> list[Shape]:
    return [Shape(model, 1, length * K, heads, **rest) for length in lengths]


MAMBA2_2B7 = _lengths("Mamba2-2.7B", (1, 4, 16, 64, 128, 256), 80)
GRID = [
    *MAMBA2_2B7,
    *_lengths("Granite-4.0-H-Tiny", (4, 16, 128), 48),
    *_lengths("Mamba2-130M", (4, 16, 128), 24),
    *_lengths("Granite-4.0-H-Small", (1, 16, 128), 128),
    *_lengths("Nemotron-H", (1, 16, 128), 128, groups=8),
    *_lengths("P = 128", (16, 64), 40, head_dim=128),
    *_lengths("Falcon-H1", (16, 64), 24, head_dim=128, state=256),
    *_lengths("N = 256", (16, 64), 48, state=256),
    Shape("Mamba2-2.7B", 32, 1 * K, 80),
    Shape("Mamba2-2.7B", 8, 16 * K, 80),
    # last: whatever counts offsets in 32 bits goes wrong here, or crashes
    *_lengths("Granite-4.0-H-Small", (256,), 128),
]
QUICK = [MAMBA2_2B7[0], MAMBA2_2B7[2], MAMBA2_2B7[4]]
