"""Rows of a weight times one vector: what one token's projections are.

Reading the weights is what takes the time here, and has to go on without a pause: a block asks for all of them at once,
or for as many as its registers hold. With OVERLAP, a kernel starts while the one before it ends (Hopper's programmatic
dependent launch), and its first weights are on their way while it waits for that one's results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BYTES = 40 << 10
"""Weights that a block of four warps holds in registers: 80 of them a thread."""


def tiles_held(rows: int, columns: int, width: int, itemsize: int) -> int:
    """How many of the tiles of `columns` that rows of `width` are cut into a block of four warps asks for at once."""
    return max(1, min(-(-width // columns), BYTES // (rows * columns * itemsize)))


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the kernels before, then let the next one start.

    In this order: what starts next may rely on all that came before this kernel, and has only this one to wait for.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_tile(at, t: tl.constexpr, has, K: tl.constexpr, BK: tl.constexpr):
    """Tile t of BK columns of the rows of K that begin at `at`. [R, BK]"""
    inside = has[:, None] & (t * BK + tl.arange(0, BK) < K)[None, :]
    return tl.load(at + t * BK, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_tiles(at, has, K: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr):
    """The first TILES tiles. [R, BK] each"""
    tiles = ()
    for t in tl.static_range(TILES):
        tiles = tiles + (load_tile(at, t, has, K, BK),)
    return tiles


@triton.jit
def tile(at, tiles, t: tl.constexpr, has, K: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr):
    """Tile t, out of the TILES that are there or from memory. [R, BK]"""
    if t < TILES:
        w = tiles[t]
    else:
        w = load_tile(at, t, has, K, BK)
    return w


@triton.jit
def sum_in_thread(v, R: tl.constexpr, BK: tl.constexpr):
    """Sums of eight neighbours, which one thread has. [R, BK / 8]

    Accumulators of all columns would take the registers that weights are to be in.
    """
    return tl.sum(tl.reshape(v, (R, BK // 8, 8)), axis=2)


@triton.jit
def product(x_ptr, at, tiles, has, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr):
    """Rows of a weight, whose first TILES tiles are there, times a vector, in float32. [R]"""
    k = tl.arange(0, BK)[None, :] + tl.zeros((R, 1), tl.int32)
    acc = tl.zeros((R, BK // 8), tl.float32)
    for t in tl.static_range((K + BK - 1) // BK):
        x = tl.load(x_ptr + t * BK + k, mask=t * BK + k < K, other=0.0).to(tl.float32)
        acc += sum_in_thread(tile(at, tiles, t, has, K, BK, TILES).to(tl.float32) * x, R, BK)
    return tl.sum(acc, axis=1)


@triton.jit
def load_vector(x_ptr, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """The tiles of a vector, or none of None. [R, BK] each"""
    # In the layout of the weights: each thread has the columns that it needs, and loads them once for all rows.
    k = tl.arange(0, BK)[None, :] + tl.zeros((R, 1), tl.int32)
    tiles = ()
    if x_ptr is not None:
        for t in tl.static_range((K + BK - 1) // BK):
            tiles = tiles + (tl.load(x_ptr + t * BK + k, mask=t * BK + k < K, other=0.0),)
    return tiles


@triton.jit
def normed(x, norm, norm_ptr, eps, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """The tiles of x in float32, or of its RMSNorm but for the scale, and that scale. [R, BK] each, [R]"""
    squares = tl.zeros((R, BK // 8), tl.float32)
    tiles = ()
    for t in tl.static_range((K + BK - 1) // BK):
        v = x[t].to(tl.float32)
        if norm_ptr is not None:
            squares += sum_in_thread(v * v, R, BK)
            v *= norm[t].to(tl.float32)
        tiles = tiles + (v,)
    scale = tl.full((R,), 1.0, tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    return tiles, scale


@triton.jit
def times(weights, vector, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Rows of a weight times a vector, from tiles of both, in float32. [R]"""
    acc = tl.zeros((R, BK // 8), tl.float32)
    for t in tl.static_range((K + BK - 1) // BK):
        acc += sum_in_thread(weights[t].to(tl.float32) * vector[t], R, BK)
    return tl.sum(acc, axis=1)
