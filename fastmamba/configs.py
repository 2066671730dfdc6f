"""Launch configurations of the kernels: frozen, measured ones where a device has a table, else by a heuristic."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastmamba import tuned
from fastmamba.ssd_plan import SPAN, plan

MOST_REGISTERS = 255
"""That a thread of an NVIDIA GPU can have."""


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
    """Chunks that are loaded ahead; in the Hopper variant fewer where a gate takes their room."""
    registers: int = MOST_REGISTERS
    """That a thread may have (portable, on NVIDIA's GPUs): with fewer, more blocks fit a multiprocessor."""
    scores: bool = False
    """Whether a launch of its own works out C B^T, once for all heads of a group (portable, not in float32)."""
    blocks: int = 1
    """That share each sequence as that launch deals it out, more of them to slow heads; 1: in equal segments."""


@dataclass(frozen=True)
class _Limits:
    """What a device offers."""

    multiprocessors: int
    shared_bytes: int
    """Shared memory that one block may take."""
    copy_engine: bool
    """Whether it copies tiles that tensor descriptors tell of (NVIDIA's since Hopper)."""


@functools.cache
def copy_engine(device: torch.device) -> bool:
    """Whether the device copies tiles by tensor descriptors; elsewhere Triton turns them into plain loads."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _limits(device: torch.device) -> _Limits:
    if device.type != "cuda":  # the interpreter, or an accelerator whose limits torch does not tell
        return _Limits(4, 64 * 1024, False)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 64 * 1024)
    return _Limits(found.multi_processor_count, shared, copy_engine(device))


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one block may take."""
    return _limits(device).shared_bytes


def _power_of_2(value: int, least: int = 16) -> int:
    return max(least, 1 << (value - 1).bit_length())


# None, a configuration, or the name of the variant that everything is to be served by.
_forced: contextvars.ContextVar[SsdConfig | str | None] = contextvars.ContextVar("fastmamba_ssd_config", default=None)


def forced() -> SsdConfig | str | None:
    """What `override` is in force."""
    return _forced.get()


def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    return _limits(device).multiprocessors


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
        and state in (64, 128, 256)
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

    `regular` says that x, B, C and z are laid out, and dt is bounded, as the Hopper variant needs it. Two look-ups in
    all: one of `override`, one of what was chosen before. A launcher that keeps launches of its own has to keep them by
    the configuration.

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
    variants = _suited(variants, dtype, head_dim, state, chunk_size, regular and batch <= _HOPPER_BATCH)
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
            batch, groups, slices // groups, chunks, _limits(device).multiprocessors, state
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
            stages=2 if state > 128 else 3 if block_slices == 2 else 4,
        )
    return _portable(device, dtype, batch, tokens, heads, head_dim, state, chunk_size)


_HOPPER_BATCH = 65535
"""Sequences at most, of the Hopper variant: they are counted by a grid's third index."""
_HOPPER_CHUNK = 64
"""Tokens of a chunk, and channels of a slice, of the Hopper variant."""


@dataclass(frozen=True)
class _Blocks:
    """What blocks of the Hopper variant cost, each alone on its multiprocessor; a chunk of two slices of 128 is 1."""

    slices: int
    """That a block walks."""
    chunk: float
    """A chunk's second pass."""
    summing: float = 0.42
    """A chunk's first pass, of its second."""
    start: float = 12.0
    """What a wave of blocks costs besides, in chunks."""
    split: float = 1.1
    """What splitting costs besides."""
    look: float = 0.7
    """What a segment pays for each segment that it looks back to, SPAN at most."""
    handover: float = 1.75
    """What one segment in SPAN waits for the one before it."""
    busy: float = 1.02
    """How much slower blocks are while no multiprocessor is idle: the clock falls."""

    def cost(self, rows: int, slices: int, chunks: int, segments: int, multiprocessors: int, lead: int = 0) -> float:
        """Of `rows` groups of sequences, each of so many slices and chunks, the first `lead` of which others walk."""
        walk = -(-(chunks - lead) // segments)
        if segments > 1:
            # By all blocks, where a segment has four chunks (the kernels' GROUP) for each. Those of one slice share
            # from nine chunks on, which would change next to no choice.
            shared = lead > 0 or walk >= 4 * segments
            walk *= 1 + self.summing * ((segments - 1) / segments if shared else 1)
            walk += self.summing * lead / segments
        waves = -(-rows * -(-slices // self.slices) * segments // multiprocessors)
        looked = self.look * min(segments - 1, SPAN) + self.handover * ((segments - 1) // SPAN)
        handed = 0.0 if segments == 1 else self.split + looked
        if lead:
            walk *= self.busy
        return waves * (walk * self.chunk + self.start) + handed


_NARROW = (_Blocks(slices=2, chunk=1.0), _Blocks(slices=1, chunk=0.6))
"""Up to 128 state channels. Fitted to 64 launches on an H200, of 8 to 128 heads and 1K to 128K tokens; of each shape's
they pick the fastest, or one 1% slower."""
_WIDE_STATE = (_Blocks(slices=2, chunk=1.0, start=10.0),)
"""More of them. Fitted to 15 launches on an H200, of 48 slices and 1K to 128K tokens; of each length's they pick the
fastest, or one 2% slower."""


def _hopper_split(
    batch: int, groups: int, slices: int, chunks: int, multiprocessors: int, state: int
) -> tuple[int, int]:
    """Into how many segments to split a sequence, and how many slices, of so many in a group, to give a block."""

    def cost(blocks: _Blocks, segments: int) -> float:
        lead = 0
        idle = multiprocessors - batch * groups * -(-slices // blocks.slices) * segments
        # One slice a block, or short segments, gained no more by leaders than the costs here are wrong by.
        if state <= 128 and blocks.slices == 2 and segments > 1 and chunks >= 32 * segments and idle > 0:
            lead = plan(batch, groups, slices, chunks, segments, blocks.slices, multiprocessors).lead
        return blocks.cost(batch * groups, slices, chunks, segments, multiprocessors, lead)

    most = max(1, min(chunks // 4, 64))
    choices = (
        (blocks, segments) for blocks in (_NARROW if state <= 128 else _WIDE_STATE) for segments in range(1, most + 1)
    )
    blocks, segments = min(choices, key=lambda choice: cost(*choice))
    return segments, blocks.slices


@dataclass(frozen=True)
class _Walk:
    """A way to walk, and what it costs on an H200: fitted to 75 launches of 24 to 128 heads and 1K to 128K tokens."""

    chunk: int
    stages: int
    resident: int
    """Blocks that a multiprocessor holds."""
    step: float
    """Microseconds of a chunk's second pass, while there are so many."""
    start: float
    """What a block costs besides its chunks, in chunks."""
    channels: int = 64
    """Of a head, that a block takes at most."""
    held: int = 2048
    """Elements of the state that a warp of four holds at most; eight share more."""
    registers: int = MOST_REGISTERS
    scores: bool = False
    summing: float = 0.35
    """A chunk's first pass, of its second."""
    handover: float = 0.5
    """What each segment adds to all: a piece of state to look back to, and one more to wait for; in chunks."""
    alone: float = 0.7
    """What a wave of one block a multiprocessor takes, of a full one; between them it grows with the blocks."""
    dealt: bool = False
    """Whether blocks are dealt out by how fast heads decay, which made these 2% to 17% faster from 4K tokens on. Others
    gain more by many equal segments, whose blocks read the same B and C at the same time."""

    def cost(self, walks: int, tokens: int, segments: int, multiprocessors: int) -> float:
        """Microseconds of `walks` sequences, each split into so many segments."""
        chunks = -(-tokens // self.chunk)
        slots = self.resident * multiprocessors
        walk = chunks if segments == 1 else (1 + self.summing) * -(-chunks // segments)
        waves, rest = divmod(walks * segments, slots)
        beside = -(-rest // multiprocessors) - 1  # blocks that one of the last wave shares a multiprocessor with
        last = 0 if rest == 0 else 1 - (1 - self.alone) * (self.resident - 1 - beside) / max(1, self.resident - 1)
        return self.step * ((waves + last) * (walk + self.start) + (min(segments, slots) - 1) * self.handover)


_TWO = _Walk(chunk=32, stages=4, resident=2, step=1.47, start=8.7, scores=True, handover=0.5, alone=0.8)
"""With a copy engine: small chunks, many of them ahead."""
_THREE = _Walk(
    chunk=32, stages=3, resident=3, step=1.86, start=8.5, registers=168, scores=True, handover=0.9, alone=0.65
)
"""The same, as many blocks as 168 registers allow: where there is enough to share out."""
_LONE = _Walk(chunk=64, stages=3, resident=1, step=1.84, start=3.1, handover=1.75)
"""With a copy engine, a block a multiprocessor: larger chunks."""
_TALL = _Walk(chunk=32, stages=4, resident=2, step=2.2, start=15.0, channels=128, held=4096, scores=True, dealt=True)
"""With a copy engine, heads of more than 64 channels: B and C are read and multiplied once for 128 of them."""
_WIDE = _Walk(
    chunk=32, stages=2, resident=2, step=2.0, start=11.0, held=4096, scores=True, summing=0.4, handover=1.0, dealt=True
)
"""With a copy engine, more than 128 state channels."""
_WIDE_TALL = _Walk(
    chunk=32,
    stages=4,
    resident=1,
    step=1.8,
    start=11.0,
    channels=128,
    held=4096,
    scores=True,
    handover=1.5,
    dealt=True,
)
"""The same for heads of more than 64 channels: eight warps in step, which would wait for C B^T."""
_PLAIN = _Walk(chunk=32, stages=2, resident=2, step=1.0, start=5.6, handover=3.1)
"""Without a copy engine. Not measured on such a GPU, but built as for one (A100) and run on an H200."""
_PLAIN_WIDE = _Walk(chunk=64, stages=2, resident=1, step=1.0, start=0.75)
"""The same, more than 128 state channels."""
_SINGLE = _Walk(chunk=16, stages=1, resident=2, step=1.0, start=10.0)
"""float32: a product is six of bfloat16 pieces, whose operands are held in registers. 16 rows spill least."""


def _ways(full: bool, limits: _Limits, head_dim: int, block_n: int) -> tuple[_Walk, ...]:
    """Those to choose from, first the one that is made smaller where none fits."""
    tall = head_dim > 64 and -(-head_dim // 128) * 2 == -(-head_dim // 64)  # no more padding than slices of 64 have
    if full:
        return (_SINGLE,)
    if not limits.copy_engine:
        return (_PLAIN if block_n <= 128 else _PLAIN_WIDE,)
    if block_n > 128:
        return (_WIDE, _WIDE_TALL) if tall and block_n <= 256 else (_WIDE,)
    return (_TWO, _THREE, _LONE, _TALL) if tall else (_TWO, _THREE, _LONE)


def _shared(walk: _Walk, limits: _Limits, block_p: int, block_n: int, size: int) -> int:
    """Bytes of a block: the tiles that are loaded ahead, those of scores and y, and some for decays."""
    # Triton has as many buffers as stages where all that reads B and C are wgmma, else one less.
    ahead = max(1, walk.stages - 1)
    whole = limits.copy_engine and (walk.chunk > 32 or walk.scores)
    buffers = walk.stages if whole else ahead
    beside = ahead if walk.scores else buffers  # of x and scores
    scores = 4 * walk.chunk * beside if walk.scores else 0
    elements = 2 * buffers * block_n + beside * block_p + walk.chunk + block_p
    return walk.chunk * (elements * size + scores + 64)


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
    block_n = _power_of_2(state)

    def fits(walk: _Walk, blocks: int) -> bool:
        each = _shared(walk, limits, min(_power_of_2(head_dim), walk.channels), block_n, dtype.itemsize) + 1024
        return blocks * each <= limits.shared_bytes + 1024

    ways = [
        dataclasses.replace(walk, chunk=min(chunk_size or walk.chunk, walk.chunk))
        for walk in _ways(full, limits, head_dim, block_n)
    ]
    usual = ways[0]
    while not fits(usual, 1) and (usual.stages > 1 or usual.chunk > 16):
        if usual.stages > 1:
            usual = dataclasses.replace(usual, stages=usual.stages - 1)
        else:
            usual = dataclasses.replace(usual, chunk=usual.chunk // 2)
    choices = []
    for walk in [walk for walk in ways if fits(walk, walk.resident)] or [usual]:
        walks = batch * heads * -(-head_dim // walk.channels)  # independent ones, each over the whole sequence
        most = max(1, min(-(-tokens // walk.chunk) // 8, 64))
        for segments in range(1, most + 1):
            choices.append((walk.cost(walks, tokens, segments, limits.multiprocessors), segments, walk))
    _, segments, walk = min(choices, key=lambda choice: choice[0])
    block_p = min(_power_of_2(head_dim), walk.channels)
    walks = heads * -(-head_dim // walk.channels)
    blocks = walk.resident * limits.multiprocessors // batch
    # so that there is a choice, and each has sixteen chunks or more
    deals = walk.dealt and segments > 1 and blocks >= 2 * walks and walks * tokens >= 16 * walk.chunk * blocks
    return SsdConfig(
        variant="portable",
        chunk=walk.chunk,
        segments=segments,
        block_p=block_p,
        block_slices=1,
        block_n=block_n,
        # more are faster, unless it is the start that counts
        rows=32 if walk.chunk == 32 and tokens > 4096 else 16,
        precision="bf16x6" if full else "tf32",
        warps=4 if block_p * block_n <= 4 * walk.held else 8,
        stages=walk.stages,
        registers=walk.registers,
        scores=walk.scores,
        blocks=blocks if deals else 1,
    )
