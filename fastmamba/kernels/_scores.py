"""C B^T of every chunk, or its diagonal alone, once for all heads of a group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from fastmamba.kernels._dot import INTERPRETED, dot
from fastmamba.kernels._launch import Launcher


@triton.jit
def store_scores(
    scores_ptr, B_ptr, C_ptr, place, chunks, T, G, stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t,
    stride_C_g, N: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C B^T of the chunk at `place`, counted through groups and sequences; [s, t], zero past the end."""
    group = place // chunks
    b = tl.cast(group // G, tl.int64)
    g = group % G
    q = tl.arange(0, Q)
    # All parts are on their way at once, and none in registers.
    PART: tl.constexpr = tl.constexpr(64 if BN > 64 else BN)
    n = tl.arange(0, PART)
    t = place % chunks * Q + q
    inside = (t < T)[:, None]
    t = t.to(tl.int64)[:, None]
    B_at = B_ptr + b * stride_B_b + t * stride_B_t + g * stride_B_g + n[None, :]
    C_at = C_ptr + b * stride_C_b + t * stride_C_t + g * stride_C_g + n[None, :]
    scores = tl.zeros([Q, Q], tl.float32)
    for part in tl.range(0, BN, PART, num_stages=BN // PART):
        B = tl.load(B_at + part, mask=inside & (part + n < N)[None, :], other=0.0)  # [s, PART]
        C = tl.load(C_at + part, mask=inside & (part + n < N)[None, :], other=0.0)  # [t, PART]
        scores += dot(B, tl.trans(C), PRECISION)
    at = scores_ptr + tl.cast(place, tl.int64) * (Q * Q) + q[:, None] * Q + q[None, :]
    tl.store(at, scores)


@triton.jit(do_not_specialize=["T", "chunks"])
def _scores_kernel(
    scores_ptr,
    B_ptr,
    C_ptr,
    T,
    chunks,
    G,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    N: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not INTERPRETED:
        gdc_launch_dependents()
    store_scores(scores_ptr, B_ptr, C_ptr, tl.program_id(0), chunks, T, G, stride_B_b, stride_B_t, stride_B_g,
                 stride_C_b, stride_C_t, stride_C_g, N, Q, BN, PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=["T", "lead", "parts"])
def _own_scores_kernel(
    own_ptr,
    B_ptr,
    C_ptr,
    T,
    lead,
    parts,
    G,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    N: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP and not INTERPRETED:
        gdc_launch_dependents()
    place = tl.program_id(0)
    group = place // parts
    b = tl.cast(group // G, tl.int64)
    g = group % G
    n = tl.arange(0, BN)
    t = place % parts * R + tl.arange(0, R)
    inside = (t < T)[:, None] & (n < N)[None, :]
    row = t.to(tl.int64)[:, None]
    B = tl.load(B_ptr + b * stride_B_b + row * stride_B_t + g * stride_B_g + n[None, :], mask=inside, other=0.0)
    C = tl.load(C_ptr + b * stride_C_b + row * stride_C_t + g * stride_C_g + n[None, :], mask=inside, other=0.0)
    own = tl.sum(B.to(tl.float32) * C.to(tl.float32), axis=1)
    tl.store(own_ptr + tl.cast(group, tl.int64) * lead + t, own, mask=t < T)


_launch = Launcher(_scores_kernel)
_launch_own = Launcher(_own_scores_kernel)


def chunk_scores(B: Tensor, C: Tensor, chunk: int, block_n: int, precision: str, overlap: bool = False) -> Tensor:
    """B[s] . C[t] of all pairs of tokens of a chunk, (B, G, chunks, s, t) in float32; zero past the end.

    Args:
        B, C: (B, T, G, N), the last axis contiguous.
        chunk: tokens of a chunk, a power of two.
        block_n: N, rounded up to a power of two.
        precision: `input_precision` of the product.
        overlap: let the kernel after this one start at once, if it is launched to; it waits before it reads this one's.
    """
    batch, tokens, groups, width = B.shape
    chunks = -(-tokens // chunk)
    out = B.new_empty((batch, groups, chunks, chunk, chunk), dtype=torch.float32)
    numbers = (tokens, chunks, groups, *B.stride()[:3], *C.stride()[:3])
    grid = (batch * groups * chunks, 1, 1)
    _launch(grid, (out, B, C), numbers, (width, chunk, block_n, precision, overlap), num_warps=4)
    return out


def own_scores(B: Tensor, C: Tensor, lead: int, block_n: int, overlap: bool = False) -> Tensor:
    """B[t] . C[t] of every token, (B, G, lead) in float32, of which the first T are written.

    Args:
        B, C, block_n, overlap: as of `chunk_scores`.
        lead: T or more.
    """
    batch, tokens, groups, width = B.shape
    rows = max(1, 2048 // block_n)
    parts = -(-tokens // rows)
    out = B.new_empty((batch, groups, lead), dtype=torch.float32)
    numbers = (tokens, lead, parts, groups, *B.stride()[:3], *C.stride()[:3])
    _launch_own((batch * groups * parts, 1, 1), (out, B, C), numbers, (width, block_n, rows, overlap), num_warps=4)
    return out
