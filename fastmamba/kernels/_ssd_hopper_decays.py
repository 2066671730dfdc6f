"""The running decays of the Hopper SSD: from dt to the numbers that other roles read."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fastmamba.kernels._ssd_hopper_copies import of_first_pass, prefetch
from fastmamba.kernels._ssd_hopper_halves import _split
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _LEFT,
    _SINCE,
    _TOTAL,
    GROUP,
    LOG2E,
    ROWS,
    Q,
    _advance,
    _seen_as,
    slices_of,
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _log2(v):
    """The hardware's logarithm: an error of 2**-22, where Triton's own has a polynomial and special cases."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [v], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _softplus(v):
    """log(1 + exp(v)) = max(v, 0) + 2 atanh(e / (2 + e)) with e = exp(-|v|), by the series of atanh, to float32."""
    e = gl.exp2(-LOG2E * gl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 / 15
    for i in gl.static_range(7):
        p = p * q + 1.0 / (13 - 2 * i)
    return gl.maximum(v, 0.0) + 2.0 * s * p


@gluon.jit
def load_bits(ptr):
    """What is at these addresses, a register each, without any wait: halves would be packed in pairs at once."""
    if ptr.dtype.element_ty == gl.float32:
        code: gl.constexpr = "ld.global.u32 $0, [$1];"
    else:
        code: gl.constexpr = "ld.global.u16 $0, [$1];"
    return gl.inline_asm_elementwise(code, "=r,l", [ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _from_bits(bits, dtype: gl.constexpr):
    """As float32."""
    if dtype == gl.bfloat16:
        return (bits << 16).to(gl.float32, bitcast=True)
    elif dtype == gl.float16:
        code: gl.constexpr = "{.reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h;}"
        return gl.inline_asm_elementwise(code, "=r,r", [bits], dtype=gl.float32, is_pure=True, pack=1)
    else:
        return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _begins(i, first_pass, ahead, gap):
    """Where the i-th four chunks of both passes begin, in chunks from the segment on."""
    return gl.where(i < first_pass, of_first_pass(i * GROUP, ahead, gap), (i - first_pass) * GROUP)


@gluon.jit
def _of_group(dt_ptr, i, first_pass, ahead, gap, q, tokens, stride_dt_t):
    """Where dt of the i-th four chunks is, of both passes; past the end, the last token's."""
    t = _begins(i, first_pass, ahead, gap) * Q + q
    return dt_ptr + gl.minimum(t, tokens - 1).to(gl.int64) * stride_dt_t


@gluon.jit
def _factor(A, LOG_A: gl.constexpr):
    """What dt is multiplied by for the logarithm of the decay, base 2."""
    A = A.to(gl.float32)
    if LOG_A:
        A = -gl.exp(A)
    return A * LOG2E


@gluon.jit
def _running(dt, A, t, tokens, dt_min, dt_max, SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr):
    """dt as the recurrence takes it, and its rows `_CUM` and `_ENTRY`."""
    if SOFTPLUS:
        dt = _softplus(dt)
    if CLAMP:
        dt = gl.minimum(gl.maximum(dt, dt_min), dt_max)
    dt = gl.where(t < tokens, dt, 0.0)  # past the end: no decay, no input
    cum = gl.associative_scan(dt * A, 1, _add)
    return dt, cum, cum - _log2(dt)


@gluon.jit
def _fact(facts, row: gl.constexpr, piece, layout: gl.constexpr):
    """A number of a piece."""
    lone: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PIECES: gl.constexpr = facts.shape[1]
    numbers = _seen_as(facts, gl.int32, [facts.shape[0] * PIECES, 1], lone)
    return gl.sum(numbers.index(row * PIECES + piece).load(gl.SliceLayout(1, layout)), axis=0)


@gluon.jit
def decays_role(
    k: gl.constexpr,
    dt_ptr,  # at [b, first token of the segment, head]
    A_ptr,
    bias_ptr,
    head,
    nums,
    known,
    unknown,
    stride_dt_t,
    dt_min,
    dt_max,
    tokens,  # left from the segment's first token on
    ahead,  # chunks of the first pass that lie before the segment, whole groups
    skip,  # the first ones of them, that are not summed up after all
    gap,  # chunks at the segment's beginning that the first pass leaves out, whole groups
    summed,  # chunks of the first pass
    chunks,
    pieces,
    block,
    listed,
    part_of_group,
    blocks_per_group,
    slices_per_group,
    stride_dt_h,
    SOFTPLUS: gl.constexpr,
    CLAMP: gl.constexpr,
    PAIR: gl.constexpr,
    SPLIT: gl.constexpr,
    LOG_A: gl.constexpr,
    SLICES: gl.constexpr,
    HEADS: gl.constexpr,
    DEALT: gl.constexpr,
    dtype: gl.constexpr,  # of x
    begun,
    facts,  # of pieces: where dt of the head is, A, bias; of each of two roles
    dts,  # of the first four chunks, from the scores' warps; not where two slices walk a whole sequence
    asked,
):
    # Two warps with one head between them take turns at the groups of chunks, and at the buffers.
    STEP: gl.constexpr = 2 if PAIR == 2 and HEADS == 1 else 1
    FIRST: gl.constexpr = k if STEP == 2 else 0
    slot: gl.constexpr = 0 if STEP == 2 else k
    # Where a block has warps to spare, four share the work, and the first chunk waits less.
    if gl.num_warps() == 1:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _seen_as(nums, dtype, [4 * HEADS * ROWS, GROUP, Q], rows)
    nums = _seen_as(nums, gl.float32, [2 * HEADS * ROWS, GROUP, Q], rows)
    chunk = gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    q = chunk[:, None] * Q + gl.arange(0, Q, gl.SliceLayout(0, layout))[None, :]  # [GROUP, Q]
    first_pass = (summed + GROUP - 1) // GROUP
    groups = first_pass + (chunks + GROUP - 1) // GROUP
    EARLY_DT: gl.constexpr = SPLIT or PAIR == 1
    i = summed * 0 + FIRST  # of a piece's groups
    piece = summed * 0
    bias = 0.0
    if SPLIT:
        if FIRST > 0:
            piece += (i >= groups).to(gl.int32)
            i -= piece * groups
        # What differs from one piece to the next: pieces are no loop of their own here, which took registers.
        lone: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        PIECES: gl.constexpr = facts.shape[1]
        each_piece = gl.arange(0, PIECES, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        blocks = block + each_piece
        if DEALT:
            entries = _seen_as(listed, gl.int32, [PIECES], lone).load(each_piece.type.layout)
            blocks = entries & 0xFFFF
        _, v, second = slices_of(blocks, part_of_group, blocks_per_group, slices_per_group, PAIR)
        heads = gl.where(each_piece < pieces, (v + second * k) // SLICES, head)
        A = gl.load(A_ptr + heads)
        places = (heads - head) * stride_dt_h
        if DEALT:
            places += gl.where(each_piece < pieces, entries >> 16, 0) * (chunks * Q) * stride_dt_t
        facts.index(3 * k).store(places)
        if bias_ptr is not None:
            facts.index(3 * k + 2).store(gl.load(bias_ptr + heads).to(gl.float32).to(gl.int32, bitcast=True))
        facts.index(3 * k + 1).store(_factor(A, LOG_A).to(gl.int32, bitcast=True))
        if bias_ptr is not None:
            bias = _fact(facts, 3 * k + 2, piece, layout).to(gl.float32, bitcast=True)
        A = _fact(facts, 3 * k + 1, piece, layout).to(gl.float32, bitcast=True)
        if FIRST > 0:
            base = dt_ptr + _fact(facts, 3 * k, piece, layout)
            coming = load_bits(_of_group(base, i, first_pass, ahead, gap, q, tokens, stride_dt_t))
    else:  # all loads before the first use of one
        first = _of_group(dt_ptr, FIRST, first_pass, ahead, gap, q, tokens, stride_dt_t)
        if not EARLY_DT:
            coming = gl.load(first)
        elif FIRST > 0:
            coming = load_bits(first)
        A = gl.load(A_ptr + head)
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + head).to(gl.float32)
        A = _factor(A, LOG_A)
    mbarrier.wait(begun, 0)
    if EARLY_DT and FIRST == 0:
        mbarrier.wait(asked, 0)
        coming = _seen_as(dts, gl.int32, [HEADS, GROUP, Q], rows).index(k).load(layout)
    buffer = FIRST
    phase = 0
    for _ in range(FIRST, groups * pieces if SPLIT else groups, STEP):
        t = _begins(i, first_pass, ahead, gap) * Q + q
        if EARLY_DT:
            dt = _from_bits(coming, dt_ptr.dtype.element_ty) + bias
        else:
            dt = coming.to(gl.float32) + bias
            coming = gl.load(_of_group(dt_ptr, i + STEP, first_pass, ahead, gap, q, tokens, stride_dt_t))
        if SPLIT:
            t = gl.where(t < (skip - ahead) * Q, tokens, t)  # as if it were past the end
        dt, cum, entry = _running(dt, A, t, tokens, dt_min, dt_max, SOFTPLUS, CLAMP)
        last = gl.sum(dt * A, axis=1)
        if SPLIT:  # in the first pass the decays of later chunks of the four are part of the weights
            rest = last
            whole = last
            everywhere: gl.constexpr = gl.SliceLayout(
                1, gl.BlockedLayout([GROUP, 1], [1, 32], [1, gl.num_warps()], [1, 0])
            )
            lasts = gl.convert_layout(last, everywhere)
            each = gl.arange(0, GROUP, everywhere)
            for j in gl.static_range(GROUP):
                later = gl.sum(gl.where(each == j, lasts, 0.0), axis=0)
                there = i * GROUP + j < summed
                rest += gl.where((chunk < j) & there, later, 0.0)
                whole += gl.where((chunk != j) & there, later, 0.0)
            left = rest[:, None] - entry
            if DEALT:  # behind what has been left out the state begins from nothing
                whole = gl.where((gap > 0) & (i * GROUP == ahead), float("-inf"), whole)
            last = whole[:, None]
        else:
            last = last[:, None]
            left = last - entry
        mbarrier.wait(unknown.index(buffer), phase ^ 1)
        row = (slot * 2 + buffer) * ROWS
        nums.index(row + _CUM).store(cum)
        nums.index(row + _ENTRY).store(entry)
        nums.index(row + _SINCE).store(gl.exp2(cum))
        value, rest = _split(gl.exp2(left), dtype)
        halves.index(2 * (row + _LEFT)).store(value)
        halves.index(2 * (row + _LEFT) + 1).store(rest)
        nums.index(row + _TOTAL).store(cum * 0.0 + gl.exp2(last))
        mbarrier.arrive(known.index(buffer), count=1)
        i += STEP
        base = dt_ptr
        if SPLIT:
            for _again in gl.static_range(STEP):  # a piece may be one group
                over = i >= groups
                i -= gl.where(over, groups, 0)
                piece += over.to(gl.int32)
            base += _fact(facts, 3 * k, piece, layout)
            A = _fact(facts, 3 * k + 1, piece, layout).to(gl.float32, bitcast=True)
            if bias_ptr is not None:
                bias = _fact(facts, 3 * k + 2, piece, layout).to(gl.float32, bitcast=True)
        if EARLY_DT:  # earlier, it would take registers of which there are none left, or hold up the first four chunks
            coming = load_bits(_of_group(base, i, first_pass, ahead, gap, q, tokens, stride_dt_t))
            if PAIR == 2:  # worth 3% with two slices; with one, 4% and 5% are gained without
                prefetch(_of_group(base, i + STEP, first_pass, ahead, gap, q, tokens, stride_dt_t))
        if STEP == 2:
            phase ^= 1
        else:
            buffer, phase = _advance(buffer, phase, 2)


@gluon.jit
def _numbers(nums, k: gl.constexpr, buffer, c, ROW: gl.constexpr, OF: gl.constexpr = ROWS):
    """A row of the block's head k in chunk c of a pass, of `OF` rows that a head has there."""
    return nums.index(((k * 2 + buffer) * OF + ROW) * GROUP + c % GROUP)


@gluon.jit
def _weights(nums, k: gl.constexpr, buffer, c, dtype: gl.constexpr, layout: gl.constexpr, OF: gl.constexpr = ROWS):
    """Those of the tokens of chunk c in the state after it, in the first pass in that after four chunks: `_split`."""
    halves = _seen_as(nums, dtype, [2 * nums.shape[0], Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    at = ((k * 2 + buffer) * OF + _LEFT) * (2 * GROUP) + c % GROUP
    return halves.index(at).load(layout), halves.index(at + GROUP).load(layout)
