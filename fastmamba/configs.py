"""Launch configurations of the kernels: frozen, measured ones where a device has a table, else by a heuristic."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastmamba import tuned


@dataclass(frozen=True)
class SsdConfig:
    """How the SSD is launched."""

    variant: str
    """Which kernel: "hopper" is the one for NVIDIA's H100 and H200, "portable" the one for every GPU."""
    chunk: int
    """Q, tokens per chunk."""
    segments: int
    """Parts of a sequence that blocks work on at the same time."""
    block_p: int
    """Head channels per block (portable)."""
    block_slices: int
    """Slices of 64 channels per block, 1 or 2 (Hopper)."""
    block_n: int
    """State channels, rounded up to a power of two."""
    rows: int
    """Chunks discretized at once in the prologue (portable)."""
    precision: str
    """`input_precision` of the matrix products."""
    warps: int
    """Warps of a block; in the Hopper variant those of one role."""
    stages: int
    """Chunks that are loaded ahead."""


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


@functools.cache
def ssd_variants(device: torch.device) -> tuple[str, ...]:
    """The variants of the SSD that can run on a device, the preferred one first."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return ("portable",)
    try:
        gluon = importlib.util.find_spec("triton.experimental.gluon.nvidia.hopper")
    except ModuleNotFoundError:
        gluon = None
    return ("portable",) if gluon is None else ("hopper", "portable")


def ssd_variant(device: torch.device, dtype: torch.dtype, head_dim: int, state: int) -> str:
    """The variant that serves a shape, given activations laid out as a model's are."""
    return _suited(ssd_variants(device), dtype, head_dim, state, None, True)[0]


def _suited(
    variants: tuple[str, ...], dtype: torch.dtype, head_dim: int, state: int, chunk_size: int | None, regular: bool
) -> tuple[str, ...]:
    """Those of `variants` that cover a shape."""
    hopper = (
        regular
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % _HOPPER_CHUNK == 0
        and state in (64, 128)
        and (chunk_size is None or chunk_size >= _HOPPER_CHUNK)
    )
    return variants if hopper else tuple(variant for variant in variants if variant != "hopper")


def ssd_config(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    state: int,
    chunk_size: int | None,
    *,
    groups: int = 1,
    regular: bool = True,
) -> SsdConfig:
    """How to launch the SSD on a shape: by the device's table, else by a heuristic; `chunk_size` bounds the chunk.

    `regular` says that x, B, C and z are laid out as the Hopper variant needs them. Two look-ups in all: one of
    `override`, one of what was chosen before. A launcher that keeps launches of its own has to keep them by the
    configuration.

    Raises:
        ValueError: where `override` names a variant that the device does not have or that does not cover the shape.
    """
    forced = _forced.get()
    if isinstance(forced, SsdConfig):
        return forced
    return _choose(device, dtype, batch, tokens, heads, head_dim, state, chunk_size, groups, regular, forced)


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
    groups: int,
    regular: bool,
    variant: str | None,
) -> SsdConfig:
    variants = ssd_variants(device)
    if variant is not None and variant not in variants:
        raise ValueError(f"variant {variant!r} of the SSD cannot run on {device}, which has {', '.join(variants)}")
    variants = _suited(variants, dtype, head_dim, state, chunk_size, regular)
    if variant is not None and variant not in variants:
        raise ValueError(
            f"variant {variant!r} of the SSD does not cover this call, which {', '.join(variants)} can serve"
        )
    if chunk_size is None and device.type == "cuda":  # a table knows the best chunk, not the best one under a bound
        entries = tuned.entries(torch.cuda.get_device_name(device), "ssd", SsdConfig)
        shape = tuned.Shape(str(dtype).removeprefix("torch."), batch, tokens, heads, head_dim, state)
        allowed = variants if variant is None else (variant,)
        found = tuned.nearest(entries, shape, lambda config: config.variant in allowed)
        if found is not None:
            return found.config
    if (variant or variants[0]) == "hopper":
        slices = heads * head_dim // _HOPPER_CHUNK
        chunks = -(-tokens // _HOPPER_CHUNK)
        segments, block_slices = _hopper_split(
            batch * groups, slices // groups, chunks, _limits(device).multiprocessors
        )
        return SsdConfig(
            variant="hopper",
            chunk=_HOPPER_CHUNK,
            segments=segments,
            block_p=_HOPPER_CHUNK * block_slices,
            block_slices=block_slices,
            block_n=state,
            rows=4,
            precision="tf32",
            warps=4,
            stages=3 if block_slices == 2 else 4,
        )
    return _portable(device, dtype, batch, tokens, heads, head_dim, state, chunk_size)


_HOPPER_CHUNK = 64
"""Tokens of a chunk, and channels of a slice, of the Hopper variant."""

_SUMMING = 0.4
"""What a chunk costs in a segment's first pass, of what it costs in the second."""

_START = 15.0
"""What a wave of blocks costs besides, in chunks."""

_SPLIT = 2.0
"""What splitting costs besides, in chunks; and each segment waits for the state of the one before it."""

_HANDOVER = 1.0
"""That wait, in chunks."""

_ALONE = 0.65
"""What a chunk costs a block of one slice, of what it costs a block of two."""


def _hopper_split(rows: int, slices: int, chunks: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many segments to split a sequence, and how many slices to give a block, alone on its multiprocessor.

    The costs were measured on an H100. `rows` are the groups of all sequences.
    """

    def cost(choice: tuple[int, int]) -> float:
        segments, block_slices = choice
        walk = chunks if segments == 1 else (1 + _SUMMING) * -(-chunks // segments)
        waves = -(-rows * -(-slices // block_slices) * segments // multiprocessors)
        handed = 0.0 if segments == 1 else _SPLIT + (segments - 1) * _HANDOVER
        return waves * ((walk if block_slices == 2 else walk * _ALONE) + _START) + handed

    most = max(1, min(chunks // 4, 64))
    return min(((segments, each) for each in (2, 1) for segments in range(1, most + 1)), key=cost)


def _portable(
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
        segments=-(-chunks // per_segment),
        block_p=block_p,
        block_slices=1,
        block_n=block_n,
        rows=16,
        precision="bf16x6" if full else "tf32",
        warps=4 if block_p * block_n <= 64 * 128 and chunk <= 64 else 8,
        stages=1,
    )
