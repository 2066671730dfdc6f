"""A mixture of SwiGLU experts on many tokens: no wait for the host, no atomics, the same bits on every run.

    1. route: the router's logits, each token's experts and shares; how many tokens of a block each expert gets
    2. scan, where there are many blocks: for each expert, how many it gets from the blocks before
    3. place: the tokens in the order of their experts
    4. up: silu(gate) * up for each expert's tokens, which are gathered as they are read
    5. down: times the share, into the token's slots
    6. combine: the sum of a token's slots, and what is to be added to it

A block of the products finds its expert from the number of tokens that each has; the grid is as large as it may have
to be, and what is left over ends at once. Very many tokens are taken in pieces, one after the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmamba.configs import copy_engine, shared_bytes
from fastmamba.kernels._dot import dot
from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._row import in_row, row_blocks
from fastmamba.kernels._silu import silu

_TAKEN = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def _moe_route_kernel(
    x_ptr,
    router_ptr,
    chosen_ptr,
    shares_ptr,
    counts_ptr,
    T,
    blocks,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`chosen` gets a token's experts, best first, and in the upper half its rank among those of its block."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    k = tl.arange(0, BK)
    has = t < T
    from_x = x_ptr + t.to(tl.int64)[:, None] * K + k[None, :]
    from_router = router_ptr + e[None, :] * K + k[:, None]
    logits = tl.zeros((BT, EP), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        x = tl.load(from_x + start, mask=has[:, None] & inside[None, :], other=0.0)
        w = tl.load(from_router + start, mask=(e < E)[None, :] & inside[:, None], other=0.0)
        logits += dot(x, w, PRECISION)
    logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
    # Integers in the order of these numbers, NaN highest; of two that are equal the lower expert wins.
    logits = tl.where(logits == 0.0, 0.0, tl.where(logits != logits, float("nan"), logits))
    bits = logits.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = bits.to(tl.int64) * 65536 + (65535 - e)[None, :].to(tl.int64)
    keys = tl.where((e < E)[None, :], keys, _TAKEN)
    taken = tl.zeros((BT, EP), tl.int32)
    experts = ()
    weights = ()
    total = tl.zeros((BT,), tl.float32)
    for slot in tl.static_range(TOP):
        key = tl.max(keys, axis=1) + tl.zeros((BT,), tl.int64)
        expert = 65535 - (key & 65535).to(tl.int32)
        mine = e[None, :] == expert[:, None]
        taken = tl.where(mine, 1, taken)
        keys = tl.where(mine, _TAKEN, keys)
        bits = (key >> 16).to(tl.int32)
        logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        if slot == 0:
            highest = logit
        weight = tl.exp(logit - highest)
        total += weight
        experts = experts + (expert,)
        weights = weights + (weight,)
    taken = tl.where(has[:, None], taken, 0)
    before = tl.cumsum(taken, axis=0) - taken
    for slot in tl.static_range(TOP):
        rank = tl.sum(tl.where(e[None, :] == experts[slot][:, None], before, 0), axis=1)
        at = t.to(tl.int64) * TOP + slot
        tl.store(chosen_ptr + at, rank * 65536 + experts[slot], mask=has)
        tl.store(shares_ptr + at, (weights[slot] / total).to(shares_ptr.dtype.element_ty), mask=has)
    tl.store(counts_ptr + e * blocks + block, tl.sum(taken, axis=0), mask=e < E)


@triton.jit
def _moe_scan_kernel(counts_ptr, totals_ptr, blocks, BLOCK: tl.constexpr):
    """Counts of an expert become those of the blocks before."""
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = 0
    for start in range(0, blocks, BLOCK):
        at = counts_ptr + e * blocks + start + i
        count = tl.load(at, mask=start + i < blocks, other=0)
        tl.store(at, total + tl.cumsum(count, axis=0) - count, mask=start + i < blocks)
        total += tl.sum(count, axis=0).to(tl.int32)
    tl.store(totals_ptr + e, total)


@triton.jit
def _moe_place_kernel(
    chosen_ptr,
    counts_ptr,
    totals_ptr,
    order_ptr,
    T,
    blocks,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    BT: tl.constexpr,
    SCANNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`order`: the slots, those of the first expert first. Up to BLOCKS blocks need no scan: each sums for itself."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, EP)
    if SCANNED:
        totals = tl.load(totals_ptr + e, mask=e < E, other=0)
        before = tl.load(counts_ptr + e * blocks + block, mask=e < E, other=0)
    else:
        b = tl.arange(0, BLOCKS)
        inside = (e < E)[:, None] & (b < blocks)[None, :]
        counts = tl.load(counts_ptr + e[:, None] * blocks + b[None, :], mask=inside, other=0)
        totals = tl.sum(counts, axis=1)
        before = tl.sum(tl.where((b < block)[None, :], counts, 0), axis=1)
        if block == 0:
            tl.store(totals_ptr + e, totals, mask=e < E)
    first = before + tl.cumsum(totals, axis=0) - totals
    for slot in tl.static_range(TOP):
        at = t * TOP + slot
        chosen = tl.load(chosen_ptr + at, mask=t < T, other=0)
        start = tl.sum(tl.where(e[None, :] == (chosen & 65535)[:, None], first[None, :], 0), axis=1)
        tl.store(order_ptr + start + (chosen >> 16), at, mask=t < T)


@triton.jit
def _rows_of(totals_ptr, tile, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile of BM rows (E for none), its first row, and where the rows of its expert end."""
    e = tl.arange(0, EP)
    totals = tl.load(totals_ptr + e, mask=e < E, other=0)
    tiles = (totals + BM - 1) // BM
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((ends <= tile).to(tl.int32) * (e < E).to(tl.int32), axis=0).to(tl.int32)
    before = tl.sum(tl.where(e < expert, totals, 0), axis=0)
    end = before + tl.sum(tl.where(e == expert, totals, 0), axis=0)
    return expert, before + (tile - tl.sum(tl.where(e < expert, tiles, 0), axis=0)) * BM, end


@triton.jit
def _moe_up_kernel(
    x_ptr,
    weight,
    order_ptr,
    totals_ptr,
    h_ptr,
    K: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One product gives gates and, beside them, what they scale. `weight`: descriptor of [2 E, J, K], or a pointer."""
    columns: tl.constexpr = (J + BN - 1) // BN
    expert, start, end = _rows_of(totals_ptr, tl.program_id(0) // columns, E, EP, BM)
    if expert == E:
        return
    column = tl.program_id(0) % columns * BN
    rows = start + tl.arange(0, BM)
    has = rows < end
    tokens = tl.load(order_ptr + rows, mask=has, other=0) // TOP
    k = tl.arange(0, BK)
    from_x = x_ptr + tokens.to(tl.int64)[:, None] * K + k[None, :]
    n = tl.arange(0, 2 * BN)
    has_n = column + n % BN < J
    both = tl.zeros((BM, 2 * BN), tl.float32)
    for at in range(0, K, BK):
        inside = has[:, None] if K % BK == 0 else has[:, None] & (at + k < K)[None, :]
        x = tl.load(from_x + at, mask=inside, other=0.0)
        if DESCRIBED:
            w = weight.load([2 * expert, column, at]).reshape(2 * BN, BK).T
        else:
            from_w = weight + expert.to(tl.int64) * (2 * J * K) + (n // BN * J + column + n % BN)[None, :] * K
            inside = has_n[None, :] if K % BK == 0 else has_n[None, :] & (at + k < K)[:, None]
            w = tl.load(from_w + (at + k)[:, None], mask=inside, other=0.0)
        both += dot(x, w, PRECISION)
    gate, up = tl.split(both.reshape(BM, 2, BN).permute(0, 2, 1))
    n = column + tl.arange(0, BN)
    to = h_ptr + rows.to(tl.int64)[:, None] * J + n[None, :]
    tl.store(to, (silu(gate) * up).to(h_ptr.dtype.element_ty), mask=has[:, None] & (n < J)[None, :])


@triton.jit
def _moe_down_kernel(
    order_ptr,
    h,
    weight,
    totals_ptr,
    shares_ptr,
    out_ptr,
    K: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`h` and `weight` are descriptors of [slots, J] and [E, K, J], or pointers."""
    columns: tl.constexpr = (K + BN - 1) // BN
    expert, start, end = _rows_of(totals_ptr, tl.program_id(0) // columns, E, EP, BM)
    if expert == E:
        return
    column = tl.program_id(0) % columns * BN
    rows = start + tl.arange(0, BM)
    has = rows < end
    slots = tl.load(order_ptr + rows, mask=has, other=0)
    shares = tl.load(shares_ptr + slots, mask=has, other=0.0).to(tl.float32)
    n = column + tl.arange(0, BN)
    k = tl.arange(0, BK)
    y = tl.zeros((BM, BN), tl.float32)
    for at in range(0, J, BK):
        if DESCRIBED:  # rows past `end` are another expert's, and come to nothing
            a = h.load([start, at])
            w = weight.load([expert, column, at]).reshape(BN, BK).T
        else:
            inside = has[:, None] if J % BK == 0 else has[:, None] & (at + k < J)[None, :]
            a = tl.load(h + rows.to(tl.int64)[:, None] * J + (at + k)[None, :], mask=inside, other=0.0)
            inside = (n < K)[None, :] if J % BK == 0 else (n < K)[None, :] & (at + k < J)[:, None]
            from_w = weight + expert.to(tl.int64) * (K * J) + n[None, :] * J
            w = tl.load(from_w + (at + k)[:, None], mask=inside, other=0.0)
        y += dot(a, w, PRECISION)
    to = out_ptr + slots.to(tl.int64)[:, None] * K + n[None, :]
    tl.store(to, (y * shares[:, None]).to(out_ptr.dtype.element_ty), mask=has[:, None] & (n < K)[None, :])


@triton.jit
def _moe_combine_kernel(slots_ptr, add_ptr, out_ptr, K: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Rounded in between, as plain PyTorch rounds."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    for start in tl.static_range(0, K, BLOCK):
        inside = in_row(start, BLOCK, K)
        y = tl.zeros((BLOCK,), tl.float32)
        for slot in tl.static_range(TOP):
            y += tl.load(slots_ptr + (t * TOP + slot) * K + start + i, mask=inside, other=0.0).to(tl.float32)
        y = y.to(out_ptr.dtype.element_ty)
        if add_ptr is not None:
            add = tl.load(add_ptr + t * K + start + i, mask=inside, other=0.0)
            y = (y.to(tl.float32) + add.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t * K + start + i, y, mask=inside)


_launch_route = Launcher(_moe_route_kernel)
_launch_scan = Launcher(_moe_scan_kernel)
_launch_place = Launcher(_moe_place_kernel)
_launch_up = Launcher(_moe_up_kernel, described=True)
_launch_down = Launcher(_moe_down_kernel, described=True)
_launch_combine = Launcher(_moe_combine_kernel)

_FEW_BLOCKS = 64
"""So many each sum up the counts of those before them, which saves a launch."""
_MOST_TOKENS = 32 * 1024
"""Taken at a time: as fast as all at once, and the space for top_k rows of each token stays small."""


class Tile(NamedTuple):
    """How a product is cut into blocks."""

    rows: int
    columns: int
    """Of the result; the up projection computes as many gates beside them."""
    depth: int
    """Of the sums, taken at a time."""
    warps: int
    stages: int


def _tiles(slots: int, experts: int, x: Tensor) -> tuple[Tile, Tile]:
    """Those of the up and of the down projection, as measured on an H200."""
    each = slots / experts
    if x.dtype == torch.float32:
        up, down = Tile(64, 32, 32, 4, 3), Tile(64, 64, 32, 4, 3)
    elif each <= 8:
        up, down = Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3)
    elif each <= 48:
        up, down = Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4)
    else:
        up, down = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)
    room = shared_bytes(x.device) // x.element_size()
    return _fitting(up, 2, room), _fitting(down, 1, room)


def _fitting(tile: Tile, factor: int, room: int) -> Tile:
    """Smaller where so many numbers, `factor` rows of weights a column, do not fit into shared memory."""
    while tile.stages * tile.depth * (tile.rows + factor * tile.columns) + 512 > room:
        if tile.columns > 32:
            tile = tile._replace(columns=tile.columns // 2)
        elif tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        else:
            tile = tile._replace(depth=tile.depth // 2)
    return tile


class _Space(NamedTuple):
    """Scratch memory, for as many tokens as are taken at a time."""

    chosen: Tensor
    shares: Tensor
    counts: Tensor
    totals: Tensor
    order: Tensor
    h: Tensor
    parts: Tensor


def moe(
    x: Tensor, router_weight: Tensor, in_weight: Tensor, out_weight: Tensor, top_k: int, add: Tensor | None
) -> Tensor:
    """Launch it; arguments as `fastmamba.ops.moe`, already checked, the weights contiguous."""
    batch, tokens, size = x.shape
    experts, _, width = out_weight.shape
    total = batch * tokens
    most = -(-total // -(-total // _MOST_TOKENS))
    slots = most * top_k
    new = x.new_empty
    out = new((batch, tokens, size))
    space = _Space(
        chosen=new(slots, dtype=torch.int32),
        shares=new(slots),
        counts=new(experts * -(-most // _route_block(most, experts)), dtype=torch.int32),
        totals=new(experts, dtype=torch.int32),
        order=new(slots, dtype=torch.int32),
        h=new((slots, width)),
        parts=new((slots, size)),
    )
    rows, sums = x.contiguous().view(total, size), out.view(total, size)
    added = None if add is None else add.contiguous().view(total, size)
    for start in range(0, total, most):
        end = min(start + most, total)
        few = None if added is None else added[start:end]
        _launch(rows[start:end], router_weight, in_weight, out_weight, top_k, few, sums[start:end], space)
    return out


def _route_block(tokens: int, experts: int) -> int:
    """Tokens that a block routes."""
    return 16 if tokens <= 1024 or experts > 128 else 64


def _launch(
    x: Tensor,
    router_weight: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    top_k: int,
    add: Tensor | None,
    out: Tensor,
    space: _Space,
) -> None:
    """The launches for x (tokens, size), into `out`."""
    tokens, size = x.shape
    experts, _, width = out_weight.shape
    slots = tokens * top_k
    chosen, shares, counts, totals, order, h, parts = space
    h = h[:slots]
    padded = max(triton.next_power_of_2(experts), 16)
    precision = "bf16x6" if x.dtype == torch.float32 else "tf32"

    block = _route_block(tokens, experts)
    blocks = -(-tokens // block)
    scanned = blocks > _FEW_BLOCKS
    wide = x.element_size() == 4 or padded > 64
    _launch_route(
        (blocks, 1, 1),
        (x, router_weight, chosen, shares, counts),
        (tokens, blocks),
        (size, experts, padded, top_k, block, 32 if wide else 128, precision),
        num_warps=4 if padded * block <= 4096 else 8,
    )
    if scanned:
        _launch_scan((experts, 1, 1), (counts, totals), (blocks,), (1024,), num_warps=4)
    _launch_place(
        (blocks, 1, 1),
        (chosen, counts, totals, order),
        (tokens, blocks),
        (experts, padded, top_k, block, scanned, 16 if blocks <= 16 else _FEW_BLOCKS),
        num_warps=4,
    )

    up, down = _tiles(slots, experts, x)
    described = copy_engine(x.device) and size % 8 == 0 and width % 8 == 0
    described = described and not (in_weight.data_ptr() | out_weight.data_ptr()) & 15
    into, source, out_of = in_weight, h, out_weight
    if described:
        into = _descriptor(in_weight.view(2 * experts, width, size), [2, up.columns, up.depth])
        source = _descriptor(h, [down.rows, down.depth])
        out_of = _descriptor(out_weight, [1, down.columns, down.depth])
    _launch_up(
        (_row_tiles(slots, experts, up) * -(-width // up.columns), 1, 1),
        (x, into, order, totals, h),
        (),
        (size, width, experts, padded, top_k, up.rows, up.columns, up.depth, described, precision),
        num_warps=up.warps,
        num_stages=up.stages,
    )
    _launch_down(
        (_row_tiles(slots, experts, down) * -(-size // down.columns), 1, 1),
        (order, source, out_of, totals, shares, parts),
        (),
        (size, width, experts, padded, down.rows, down.columns, down.depth, described, precision),
        num_warps=down.warps,
        num_stages=down.stages,
    )
    columns, warps = row_blocks(size)
    _launch_combine((tokens, 1, 1), (parts, add, out), (), (size, top_k, columns), num_warps=warps)


def _row_tiles(slots: int, experts: int, tile: Tile) -> int:
    """The most tiles that the experts' rows may take, however they are spread."""
    return min(slots, (slots + experts * (tile.rows - 1)) // tile.rows)


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
