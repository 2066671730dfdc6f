"""Rows of a weight times one vector: what one token's projections are.

With OVERLAP, a kernel starts while the one before it ends (Hopper's programmatic dependent launch), and loads its first
weights before it waits for that one's results.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait for the kernels before, then let the next one start.

    In this order: what starts next may rely on all that came before this kernel, and has only this one to wait for.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def first_weights(weight_ptr, r, has, stride_w, K: tl.constexpr, BK: tl.constexpr):
    """Addresses of rows r, and their first BK columns. [R, BK]"""
    k = tl.arange(0, BK)
    at = weight_ptr + r.to(tl.int64)[:, None] * stride_w + k[None, :]
    return at, tl.load(at, mask=has[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def product(x_ptr, norm_ptr, at, w, r, has, eps, K: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Rows of a weight times a vector, or times its RMSNorm, in float32. [R]"""
    # The vector is loaded for each row, out of the L1 cache: in the layout of the weights, so that no thread waits for
    # another until the sum.
    k = tl.arange(0, BK)[None, :] + 0 * r[:, None]
    acc = tl.zeros((R, BK), tl.float32)
    squares = tl.zeros((R, BK), tl.float32)
    for start in tl.static_range(0, K, BK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            x *= tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x
        if start + BK < K:
            inside = has[:, None] & (start + BK + k < K)
            w = tl.load(at + (start + BK), mask=inside, other=0.0, eviction_policy="evict_first")
    y = tl.sum(acc, axis=1)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
    return y
