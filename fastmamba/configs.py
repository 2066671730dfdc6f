"""Launch configurations of the kernels: frozen, measured ones where a device has a table, else by a heuristic."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastmamba import tuned


@dataclass(frozen=True)
class SsdConfig:
    """How the SSD is launched."""

    variant: str
    """Which kernel: "portable" is the one in Triton."""
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


@dataclass(frozen=True)
class _Limits:
    """What a device offers."""

    multiprocessors: int
    shared_bytes: int
    """Shared memory that one block may take."""


@functools.cache
def _limits(device: torch.device) -> _Limits:
    if device.type != "cuda":  # the interpreter, or an accelerator whose limits torch does not tell
        return _Limits(4, 64 * 1024)
    found = torch.cuda.get_device_properties(device)
    return _Limits(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 64 * 1024))


def _power_of_2(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


# None, a configuration, or the name of the variant that everything is to be served by.
_forced: contextvars.ContextVar[SsdConfig | str | None] = contextvars.ContextVar("fastmamba_ssd_config", default=None)


@contextlib.contextmanager
def override(forced: SsdConfig | str) -> Iterator[None]:
    """Serve every SSD call of this thread (or task) by one configuration, or by the best one of a variant.

    For tuning and measuring: a configuration is taken as it is, whether it suits the shape or not.
    """
    token = _forced.set(forced)
    try:
        yield
    finally:
        _forced.reset(token)


def ssd_variants(device: torch.device) -> tuple[str, ...]:
    """The variants of the SSD that can run on a device."""
    return ("portable",)


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
    """How to launch the SSD on a shape: by the device's table, else by a heuristic; `chunk_size` bounds the chunk.

    Two look-ups in all: one of `override`, one of what was chosen before. A launcher that keeps launches of its own has
    to keep them by the configuration.

    Raises:
        ValueError: where `override` names a variant that the device does not have.
    """
    forced = _forced.get()
    if isinstance(forced, SsdConfig):
        return forced
    return _choose(device, dtype, batch, tokens, heads, head_dim, state, chunk_size, forced)


@functools.lru_cache(maxsize=512)
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    state: int,
    chunk_size: int | None,
    variant: str | None,
) -> SsdConfig:
    variants = ssd_variants(device)
    if variant is not None and variant not in variants:
        raise ValueError(f"variant {variant!r} of the SSD cannot run on {device}, which has {', '.join(variants)}")
    if chunk_size is None and device.type == "cuda":  # a table knows the best chunk, not the best one under a bound
        entries = tuned.entries(torch.cuda.get_device_name(device), "ssd", SsdConfig)
        shape = tuned.Shape(str(dtype).removeprefix("torch."), batch, tokens, heads, head_dim, state)
        allowed = variants if variant is None else (variant,)
        found = tuned.nearest(entries, shape, lambda config: config.variant in allowed)
        if found is not None:
            return found.config
    return _heuristic(device, dtype, batch, tokens, heads, head_dim, state, chunk_size)


def _heuristic(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    state: int,
    chunk_size: int | None,
) -> SsdConfig:
    full = dtype == torch.float32
    limits = _limits(device)
    block_p = min(_power_of_2(head_dim), 64)
    block_n = _power_of_2(state)
    # In float32 a product is six of bfloat16 pieces, whose operands are held in registers: 16 rows spill
    # least, and were fastest (H200).
    chunk = min(chunk_size or 64, 16 if full else 256)
    while chunk > 16 and (chunk * (block_p + 2 * block_n) + block_p * block_n) * dtype.itemsize > limits.shared_bytes:
        chunk //= 2
    walks = batch * heads * -(-head_dim // block_p)  # independent ones, each over the whole sequence
    chunks = -(-tokens // chunk)
    per_segment = chunks
    if walks < 4 * limits.multiprocessors:
        # Enough segments to fill the GPU, but each long enough to pay for its extra pass and the hand-over: at 80 heads
        # 16 chunks were best at 16K tokens and 64 at 128K (H200).
        per_segment = min(chunks, max(16, -(-chunks * walks // (16 * limits.multiprocessors))))
    return SsdConfig(
        variant="portable",
        chunk=chunk,
        chunks_per_segment=per_segment,
        block_p=block_p,
        block_n=block_n,
        rows=16,
        precision="bf16x6" if full else "tf32",
        warps=4 if block_p * block_n <= 64 * 128 and chunk <= 64 else 8,
        stages=1,
    )
