"""What the portable SSD kernel works out of dt before its main loops."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fastmamba.kernels._dealt import NOTHING
from fastmamba.kernels._dot import INTERPRETED
from fastmamba.kernels._exp2 import exp2
from fastmamba.kernels._softplus import softplus_by_series

LOG2E = tl.constexpr(1.4426950408889634)

# Rows of scratch memory that the prologue leaves, each [b, h, slice, t] in float32.
ENTRY = tl.constexpr(0)  # CUM less log2 of dt: 2 ** (CUM[t] - ENTRY[s]) is what s contributes at t; or dt itself
CUM = tl.constexpr(1)  # log2 of the decay since the chunk began
LEFT = tl.constexpr(2)  # dt times the decay until the chunk ends
ITSELF = tl.constexpr(3)  # what a token's x is multiplied by in its own y: dt times C . B, and D (half precision)
LOW = tl.constexpr(3)  # what rounding CUM lost (float32)
SUMMED = tl.constexpr(4)  # dt times the decay until the segment ends

NOTHING_EXACT = tl.constexpr(-150.0)
"""`NOTHING` for float32 inputs: what float32 itself makes zero, so that leaving it out changes no bit."""


@triton.jit
def four_rows(numbers, row: tl.constexpr, at, Q: tl.constexpr):
    """Rows `row` to `row` + 3 of a chunk's tokens, each [Q], by a tensor descriptor."""
    even, odd = tl.split(tl.reshape(tl.trans(numbers.load([row, at])), Q, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def two_rows(numbers, row: tl.constexpr, at, Q: tl.constexpr):
    """Rows `row` and `row` + 1 of a chunk's tokens, each [Q], by a tensor descriptor."""
    return tl.split(tl.trans(numbers.load([row, at])))


@triton.jit
def _log2(v):
    """log2 of a float32 that is not negative, to 4e-7 or half its own last bit.

    What is less than the smallest normal number counts as zero.
    """
    bits = v.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23  # so that what is left is between the root of 1/2 and that of 2
    f = (bits - (whole << 23)).to(tl.float32, bitcast=True) - 1.0
    series = 0.17063431
    series = series * f - 0.2726979
    series = series * f + 0.2972626
    series = series * f - 0.35896185
    series = series * f + 0.48046502
    series = series * f - 0.7213759
    series = series * f + 1.4426997
    return tl.where(bits < 0x800000, float("-inf"), series * f + whole.to(tl.float32))


@triton.jit
def power_of_2(v, COMPENSATED: tl.constexpr):
    """2 ** v in float32, of float64 if COMPENSATED."""
    if COMPENSATED:
        high = v.to(tl.float32)
        power = exp2(high, (v - high.to(tl.float64)).to(tl.float32), True)
    else:
        power = tl.exp2(v)
    return power


@triton.jit
def _dt(dt_ptr, t, chunk, chunks, tokens, stride_dt_t):
    """dt of a segment's tokens, as it is given; zero before its first chunk and past its end."""
    inside = (chunk >= 0) & (chunk < chunks) & (t < tokens)
    return tl.load(dt_ptr + t.to(tl.int64) * stride_dt_t, mask=inside, other=0.0)


@triton.jit
def discretize(
    dt_ptr,  # at [b, first token of the segment, h]
    nums_ptr,  # at [b, h, slice, first token of the segment]
    own_ptr,  # C . B, at [b, g, first token of the segment]; or None
    lead,
    stride_dt_t,
    own_chunk,  # elements of own from a chunk to the next
    own_token,
    tokens,  # left from the segment's first token on
    chunks,
    A,
    bias,
    skip,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    COMPENSATED: tl.constexpr,
    STEPS: tl.constexpr,
    SPLIT: tl.constexpr,
    ENGINE: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    """Leave what the main loops need of dt in scratch memory; return log2 of the segment's decay.

    And the first of the segment's chunks from whose end on it is not below NOTHING, if SPLIT: what the chunks before
    add to the state is left out. What grows again never is; a NaN ends where it has decayed to nothing.

    A decay is the power of two of a difference of running sums of dt * A * log2(e). Where they reach hundreds, float32
    alone leaves the difference an absolute error near 1e-5: nothing to half precision, but many roundings of float32.
    COMPENSATED sums in float64 and keeps what rounding the sum lost beside it. R chunks are worked out at a time, the
    last ones first.
    """
    wide: tl.constexpr = tl.constexpr(tl.float64 if COMPENSATED else tl.float32)
    row = tl.arange(0, R)
    col = tl.arange(0, Q)
    rounds = (chunks + R - 1) // R
    counted = chunks - 1
    after = tl.cast(0.0, wide)  # log2 of the decay from a round's last token to the segment's
    rate = tl.cast(A, wide) * LOG2E
    # What is loaded is used a round later: the memory's latency passes beside arithmetic.
    chunk = (rounds - 1) * R + row[None, :]
    coming = _dt(dt_ptr, chunk * Q + col[:, None], chunk, chunks, tokens, stride_dt_t)
    own = tl.zeros([Q, R], tl.float32)
    own_dt = tl.full([Q, R], 1.0, tl.float32)
    for i in range(rounds):
        chunk = (rounds - 1 - i) * R + row[None, :]
        t = chunk * Q + col[:, None]  # [Q, R]
        there = chunk < chunks
        inside = there & (t < tokens)
        dt = coming.to(tl.float32)
        coming = _dt(dt_ptr, t - R * Q, chunk - R, chunks, tokens, stride_dt_t)
        if SOFTPLUS and COMPENSATED:
            dt = dt.to(tl.float64) + bias
            dt = (tl.maximum(dt, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(dt)))).to(tl.float32)
        elif SOFTPLUS:
            dt = softplus_by_series(dt + bias)
        else:
            dt += bias
        if CLAMP:
            dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
        dt = tl.where(inside, dt, 0.0)  # past the end: no decay, no input
        exact = tl.cumsum(dt.to(wide) * rate, axis=0)
        cum = exact.to(tl.float32)
        last = tl.sum(dt.to(wide) * rate, axis=0)  # [R]
        left = tl.expand_dims(last, 0) - exact  # log2 of the decay until the chunk ends
        tl.store(nums_ptr + CUM * lead + t, cum, mask=there)
        if STEPS:
            tl.store(nums_ptr + ENTRY * lead + t, dt, mask=there)
            scale = dt
        else:
            log = _log2(dt)
            tl.store(nums_ptr + ENTRY * lead + t, cum - log, mask=there)
            left += log
            scale = 1.0
        tl.store(nums_ptr + LEFT * lead + t, scale * power_of_2(left, COMPENSATED), mask=there)
        if SPLIT:
            later = tl.cumsum(last, axis=0, reverse=True) - last + after  # chunks of this round, and later rounds
            summed = scale * power_of_2(left + tl.expand_dims(later, 0), COMPENSATED)
            tl.store(nums_ptr + SUMMED * lead + t, summed, mask=there)
            least: tl.constexpr = tl.constexpr(NOTHING_EXACT if COMPENSATED else NOTHING)
            counted = tl.minimum(counted, tl.min(tl.where(later < least, chunks, (rounds - 1 - i) * R + row), axis=0))
            after += tl.sum(last, axis=0)
        if own_ptr is not None:
            if ENGINE and not INTERPRETED:
                gdc_wait()  # the launch before this one may still be writing them
            tl.store(nums_ptr + ITSELF * lead + t + Q * R, own * own_dt + skip, mask=(chunk + R < chunks) & (i > 0))
            own = tl.load(own_ptr + chunk.to(tl.int64) * own_chunk + col[:, None] * own_token, mask=inside, other=0.0)
            own_dt = dt
        if COMPENSATED:
            tl.store(nums_ptr + LOW * lead + t, (exact - cum.to(tl.float64)).to(tl.float32), mask=there)
    if own_ptr is not None:
        first = row[None, :]
        tl.store(nums_ptr + ITSELF * lead + first * Q + col[:, None], own * own_dt + skip, mask=first < chunks)
    if ENGINE and not INTERPRETED:  # the copy engine reads it back, too
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()  # the block's other threads read it back
    return after, counted
