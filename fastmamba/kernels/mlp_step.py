"""One token through a SwiGLU multilayer perceptron, with its norm, its residual and a mixture of experts beside it.

    1. norm, gate and up projections; with experts, the router's logits from the first blocks of the same kernel, the
       last of which to finish chooses
    2. with experts: gate and up projections of those chosen, times their share
    3. down projections, residual

Kernels overlap as those of `layer_step`, and the last one knows its experts and loads weights before it waits: the
choice is two kernels old.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._row_product import BYTES, load_tile, load_tiles, product, sum_in_thread, tile, tiles_held, wait
from fastmamba.kernels._silu import silu
from fastmamba.kernels._sync import zeros_left_as_found


@triton.jit
def _rows(weight_ptr, r, ALIGNED: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Addresses of the first BK columns of rows r. [R, BK]"""
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
    return weight_ptr + r.to(tl.int64)[:, None] * K + tl.arange(0, BK)[None, :]


@triton.jit
def _gate_up(
    x_ptr, norm_ptr, at, up, gates, ups, has, has_up, eps, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Rows of two weights times a vector, or times its RMSNorm, in float32. ([R], [R])

    `at` and `up` are the rows' addresses, `gates` and `ups` their first TILES tiles.
    """
    k = tl.arange(0, BK)[None, :] + tl.zeros((R, 1), tl.int32)
    gate_sum = tl.zeros((R, BK // 8), tl.float32)
    up_sum = tl.zeros((R, BK // 8), tl.float32)
    squares = tl.zeros((R, BK // 8), tl.float32)
    for t in tl.static_range((K + BK - 1) // BK):
        x = tl.load(x_ptr + t * BK + k, mask=t * BK + k < K, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += sum_in_thread(x * x, R, BK)
            x *= tl.load(norm_ptr + t * BK + k, mask=t * BK + k < K, other=0.0).to(tl.float32)
        g = tile(at, gates, t, has, K, BK, TILES)
        u = tile(up, ups, t, has_up, K, BK, TILES)
        gate_sum += sum_in_thread(g.to(tl.float32) * x, R, BK)
        up_sum += sum_in_thread(u.to(tl.float32) * x, R, BK)
    gate = tl.sum(gate_sum, axis=1)
    value = tl.sum(up_sum, axis=1)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
        gate *= scale
        value *= scale
    return gate, value


# The router makes of a row, in float32: E logits, the TOP experts that are chosen, and their shares. Loads go past
# the L1 cache, which may still hold what the layer before left at this address.


@triton.jit
def _choose(routed_ptr, E: tl.constexpr, BE: tl.constexpr, TOP: tl.constexpr):
    """Rank experts by their logit (of equal ones the first is ahead) and write those chosen."""
    i = tl.arange(0, BE)
    logits = tl.load(routed_ptr + i, mask=i < E, other=float("-inf"), cache_modifier=".cg")
    ahead = (logits[None, :] > logits[:, None]) | ((logits[None, :] == logits[:, None]) & (i[None, :] < i[:, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    part = tl.exp(logits - tl.max(logits, axis=0))
    share = tl.fdiv(part, tl.sum(tl.where(rank < TOP, part, 0.0), axis=0))
    tl.store(routed_ptr + E + rank, i.to(tl.float32), mask=rank < TOP)
    tl.store(routed_ptr + E + TOP + rank, share, mask=rank < TOP)


@triton.jit
def _expert(routed_ptr, slot, E: tl.constexpr):
    """The expert chosen in a slot; some expert where logits are NaN, and ranks thereby equal."""
    expert = tl.load(routed_ptr + E + slot, cache_modifier=".cg").to(tl.int32)
    return tl.minimum(tl.maximum(expert, 0), E - 1).to(tl.int64)


@triton.jit
def _up_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    router_ptr,
    h_ptr,
    routed_ptr,
    counter_ptr,
    eps,
    stride_x_b,
    stride_h_b,
    K: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    BE: tl.constexpr,
    TOP: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    ROUTING: tl.constexpr = (E + R - 1) // R
    block = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    r = (block - ROUTING) * R + tl.arange(0, R)
    has_up = r < INNER
    has = has_up
    routes = block < ROUTING
    if E > 0:  # the first blocks have rows of the router: the choice is made while others are still at work
        r = tl.where(routes, r + ROUTING * R, r)
        has_up = r < tl.where(routes, 0, INNER)
        has = r < tl.where(routes, E, INNER)
        weight_ptr = tl.where(routes, router_ptr.to(tl.int64), weight_ptr.to(tl.int64)).to(weight_ptr.dtype)
    at = _rows(weight_ptr, r, ALIGNED, K, R, BK)
    up = at + INNER * K
    gates = load_tiles(at, has, K, BK, TILES)
    ups = load_tiles(up, has_up, K, BK, TILES)
    wait(OVERLAP)
    g, u = _gate_up(x_ptr + b * stride_x_b, norm_ptr, at, up, gates, ups, has, has_up, eps, K, R, BK, TILES)
    tl.store(h_ptr + b * stride_h_b + r, silu(g) * u, mask=has_up)
    if E > 0:
        if routes:
            routed_ptr += b * (E + 2 * TOP)
            tl.store(routed_ptr + r, g, mask=r < E)
            tl.debug_barrier()  # every thread's logits are written before they are counted
            arrived = tl.atomic_add(counter_ptr + b, 1)
            if arrived == ROUTING - 1:
                tl.store(counter_ptr + b, 0)  # left as it was found
                _choose(routed_ptr, E, BE, TOP)


@triton.jit
def _experts_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    routed_ptr,
    h_ptr,
    eps,
    stride_x_b,
    stride_h_b,
    K: tl.constexpr,
    INNER: tl.constexpr,
    EXPERT: tl.constexpr,
    E: tl.constexpr,
    TOP: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCKS: tl.constexpr = (EXPERT + R - 1) // R
    slot = tl.program_id(0) // BLOCKS
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) % BLOCKS * R + tl.arange(0, R)
    has = r < EXPERT
    wait(OVERLAP)
    routed_ptr += b * (E + 2 * TOP)
    share = tl.load(routed_ptr + E + TOP + slot, cache_modifier=".cg")
    at = _rows(weight_ptr + _expert(routed_ptr, slot, E) * (2 * EXPERT * K), r, ALIGNED, K, R, BK)
    up = at + EXPERT * K
    gates = load_tiles(at, has, K, BK, TILES)
    ups = load_tiles(up, has, K, BK, TILES)
    g, u = _gate_up(x_ptr + b * stride_x_b, norm_ptr, at, up, gates, ups, has, has, eps, K, R, BK, TILES)
    tl.store(h_ptr + b * stride_h_b + INNER + slot * EXPERT + r, share * (silu(g) * u), mask=has)


@triton.jit
def _down_kernel(
    h_ptr,
    weight_ptr,
    experts_ptr,
    routed_ptr,
    residual_ptr,
    out_ptr,
    scale,
    stride_h_b,
    stride_r_b,
    K: tl.constexpr,
    INNER: tl.constexpr,
    EXPERT: tl.constexpr,
    E: tl.constexpr,
    TOP: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BI: tl.constexpr,
    BX: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * R + tl.arange(0, R)
    has = r < K
    at = weight_ptr + r.to(tl.int64)[:, None] * INNER + tl.arange(0, BI)[None, :]
    tiles = load_tiles(at, has, INNER, BI, TILES)
    if E > 0:
        routed_ptr += b * (E + 2 * TOP)
        STEPS: tl.constexpr = (EXPERT + BX - 1) // BX
        held = ()
        for slot in tl.static_range(HELD):
            here = _rows(experts_ptr + _expert(routed_ptr, slot, E) * (K * EXPERT), r, ALIGNED, EXPERT, R, BX)
            held = held + load_tiles(here, has, EXPERT, BX, STEPS)
    wait(OVERLAP)
    h_ptr += b * stride_h_b
    y = product(h_ptr, at, tiles, has, INNER, R, BI, TILES)
    if E > 0:
        h_ptr += INNER
        x = tl.arange(0, BX)[None, :] + tl.zeros((R, 1), tl.int32)
        mixed = tl.zeros((R, BX // 8), tl.float32)
        for slot in tl.static_range(TOP):
            here = _rows(experts_ptr + _expert(routed_ptr, slot, E) * (K * EXPERT), r, ALIGNED, EXPERT, R, BX)
            for t in tl.static_range(STEPS):
                if slot < HELD:
                    v = held[slot * STEPS + t]
                else:
                    v = load_tile(here, t, has, EXPERT, BX)
                h = tl.load(h_ptr + slot * EXPERT + t * BX + x, mask=t * BX + x < EXPERT, other=0.0)
                mixed += sum_in_thread(v.to(tl.float32) * h, R, BX)
        y += tl.sum(mixed, axis=1)
    if residual_ptr is not None:
        y = y * scale + tl.load(residual_ptr + b * stride_r_b + r, mask=has, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * K + r, y.to(out_ptr.dtype.element_ty), mask=has)


_launch_up = Launcher(_up_kernel)
_launch_experts = Launcher(_experts_kernel)
_launch_down = Launcher(_down_kernel)

_ROWS = 4, 8, 8
"""Rows of a weight that a block of each kernel takes."""
_ROWS_WITH_EXPERTS = 2, 4, 4
_WARPS = 4


def mlp_step(
    x: Tensor,
    in_weight: Tensor,
    out_weight: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    router_weight: Tensor | None,
    expert_in_weight: Tensor | None,
    expert_out_weight: Tensor | None,
    top_k: int,
    residual_scale: float | None,
    counter: Tensor | None,
    overlap: bool,
) -> Tensor:
    """Launch the step; arguments as `fastmamba.ops.mlp_step`, already checked, the weights contiguous."""
    batch, size = x.shape
    inner = out_weight.shape[1]
    experts, expert = (0, 1) if expert_out_weight is None else (expert_out_weight.shape[0], expert_out_weight.shape[2])
    if experts == 0:
        top_k = 0
    width = inner + top_k * expert
    h = in_weight.new_empty((batch, width), dtype=torch.float32)
    routed = None
    if experts:
        routed = in_weight.new_empty((batch, experts + 2 * top_k), dtype=torch.float32)
        if counter is None:
            counter = zeros_left_as_found(batch, x.device)
    residual = None if residual_scale is None else x
    out = in_weight.new_empty((batch, size), dtype=in_weight.dtype if residual is None else x.dtype)
    weights = (in_weight, router_weight, expert_in_weight, expert_out_weight)
    aligned = not any(weight.data_ptr() & 15 for weight in weights if weight is not None)
    options = {"launch_pdl": True} if overlap else {}
    padded = triton.next_power_of_2(max(experts, 1))
    norm = None if norm_weight is None else norm_weight.contiguous()
    up_rows, expert_rows, down_rows = _ROWS_WITH_EXPERTS if experts else _ROWS
    itemsize, columns = in_weight.element_size(), _columns(size)
    _launch_up(
        (triton.cdiv(inner, up_rows) + triton.cdiv(experts, up_rows), batch, 1),
        (x, in_weight, norm, router_weight, h, routed, counter),
        (norm_eps, x.stride(0), width),
        (size, inner, experts, padded, top_k, aligned, up_rows, columns)
        + (tiles_held(2 * up_rows, columns, size, itemsize), overlap),
        num_warps=_WARPS,
        **options,
    )
    if experts:
        _launch_experts(
            (triton.cdiv(expert, expert_rows) * top_k, batch, 1),
            (x, expert_in_weight, norm, routed, h),
            (norm_eps, x.stride(0), width),
            (size, inner, expert, experts, top_k, aligned, expert_rows, columns)
            + (tiles_held(2 * expert_rows, columns, size, itemsize), overlap),
            num_warps=_WARPS,
            **options,
        )
    held = min(top_k, BYTES // (down_rows * expert * itemsize))
    _launch_down(
        (triton.cdiv(size, down_rows), batch, 1),
        (h, out_weight, expert_out_weight, routed, residual, out),
        (1.0 if residual_scale is None else float(residual_scale), width, 0 if residual is None else x.stride(0)),
        (
            *(size, inner, expert, experts, top_k, aligned),
            *(down_rows, _columns(inner), _columns(expert)),
            *(tiles_held(down_rows, _columns(inner), inner, itemsize), held, overlap),
        ),
        num_warps=_WARPS,
        **options,
    )
    return out


def _columns(length: int) -> int:
    """Columns of a weight that a block takes at a time: few past the last one, and not so many steps."""
    if length > 4096:
        return 1024
    return min(max(triton.next_power_of_2(length), 8), 512 if length % 512 == 0 or length > 2048 else 256)
