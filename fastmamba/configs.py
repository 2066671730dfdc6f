"""Launch configurations of the Triton kernels: frozen, chosen by a heuristic of shape and device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SsdConfig:
    """How the fused SSD kernel is launched."""

    chunk: int
    """Q, tokens per chunk."""
    chunks_per_segment: int
    """Chunks that one block walks before another takes over."""
    block_p: int
    """Head channels per block."""
    block_n: int
    """State channels, rounded up to a power of two."""
    rows: int
    """Chunks discretized at once in the prologue."""
    precision: str
    """`input_precision` of the matrix products."""
    warps: int
    stages: int


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _power_of_2(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


@functools.lru_cache(maxsize=512)
def ssd_config(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    state: int,
    chunk_size: int | None,
) -> SsdConfig:
    """Choose the launch configuration of the fused SSD kernel for a shape."""
    full = dtype == torch.float32
    chunk = chunk_size or (32 if full else 64)
    block_p = min(_power_of_2(head_dim), 64)
    block_n = _power_of_2(state)
    walks = batch * heads * -(-head_dim // block_p)  # independent ones, each over the whole sequence
    chunks = -(-tokens // chunk)
    per_segment = chunks
    processors = _multiprocessors(device)
    if walks < 4 * processors:
        # Enough segments to fill the GPU, but each long enough to pay for its extra pass and the hand-over: at 80 heads
        # 16 chunks were best at 16K tokens and 64 at 128K (H200).
        per_segment = min(chunks, max(16, -(-chunks * walks // (16 * processors))))
    return SsdConfig(
        chunk=chunk,
        chunks_per_segment=per_segment,
        block_p=block_p,
        block_n=block_n,
        rows=16,
        precision="tf32x3" if full else "tf32",
        warps=4 if block_p * block_n <= 64 * 128 else 8,
        stages=1,
    )
