"""The SSD prefill, for every GPU that Triton supports: a short launch for what heads share, and one for all the rest.

A block owns one (batch row, head, slice of P) over one segment of the sequence, and keeps the state in registers in
float32 while it walks the segment chunk by chunk. Where batch x heads does not fill the GPU, the sequence is split into
several segments. Then a block first sums up what its own segment adds to the state (a short pass over x and B), tells
the segments after, waits until the ones before have done the same, and only then walks the segment for the output.
What has decayed to nothing by a segment's end is left out of that sum, and what has since of what the ones before tell.
Where that differs between heads, the launch before can cut slow heads' sequences into more segments (`_dealt`).

Everything is transposed: channels are the rows, so that the state and x are the left operands of the products, which
tensor cores can take from registers. x, B, C and y go through tensor descriptors where the GPU has a copy engine for
them and the tensors are laid out as it needs; in half precision so do C B^T and the decays of a chunk, four rows of
them as one tile: a row by itself would be copied in pieces of four bytes, once in each layout that it is used in.

In half precision the launch before works out C . B of each token, of which a token's own contribution to y is made:
that is the largest of all, and is added in float32. Blocks that would wait for C B^T of a whole chunk get it from there
as well, once for all heads of a group.

Blocks take their work from an atomic ticket, segments in order, so a block only ever waits for a block that has already
started: no start order can deadlock. Which block does a piece of work never changes what is added to what in which
order, so the bits are the same on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from fastmamba.configs import MOST_REGISTERS, SsdConfig, copy_engine
from fastmamba.kernels._before import before
from fastmamba.kernels._dealt import MOST, NOTHING, Costs, Slots, Steps
from fastmamba.kernels._decays import (
    CUM,
    ENTRY,
    ITSELF,
    LEFT,
    LOW,
    NOTHING_EXACT,
    SUMMED,
    discretize,
    four_rows,
    power_of_2,
    two_rows,
)
from fastmamba.kernels._dot import INTERPRETED, dot, finished
from fastmamba.kernels._exp2 import exp2
from fastmamba.kernels._launch import Launcher, unit_stride
from fastmamba.kernels._scores import chunk_scores, own_scores
from fastmamba.kernels._sync import zeros_left_as_found

_COSTS = Costs(first=0.27, start=6.0, handover=3.0)
"""Of a segment, as fitted on an H200 to heads of 128 channels with states of 256."""
SPAN = tl.constexpr(16)
"""Segments that one looks back to at most."""


@triton.jit
def _tile(
    source, b, t, column, stride_b, stride_t, tokens, width, Q: tl.constexpr, W: tl.constexpr, DESCRIBED: tl.constexpr
):
    """Rows t to t + Q of batch row b and W columns of a token-major tensor, [Q, W]: zero past its end and past `width`.

    `source` is a tensor descriptor, or a pointer.
    """
    if DESCRIBED:
        return source.load([b, t, column]).reshape(Q, W)
    else:
        q = tl.arange(0, Q)
        w = tl.arange(0, W)
        # int64 wherever a sequence position enters: 256K tokens pass 2**31 elements
        at = source + tl.cast(b, tl.int64) * stride_b + tl.cast(t, tl.int64) * stride_t + column
        return tl.load(
            at + q[:, None] * stride_t + w[None, :], mask=(q < tokens - t)[:, None] & (w < width)[None, :], other=0.0
        )


@triton.jit
def _weigh(xT, weight):
    """x times what it weighs in the state, in the dtype of x: [P, Q]."""
    return (xT.to(tl.float32) * weight[None, :]).to(xT.dtype)


@triton.jit
def _plus(a, b):
    """a + b, of two products that are not to become one sum: tensor cores cut off what a partial sum gains below its
    last bit, so that shorter sums lose less of float32.
    """
    return tl.fma(b, tl.full(b.shape, 1.0, tl.float32), a)


@triton.jit
def _handed_on(handed, passed, count, size, there, STEPS: tl.constexpr, EXACT: tl.constexpr):
    """Some of the state before a segment, of what the `count` segments before it handed on, each `size` elements.

    And the decay since the first of these began. Both end where nothing is left, unless that could grow again.
    """
    bound = -1.0
    if not STEPS:
        bound = tl.exp2(tl.full([], NOTHING_EXACT if EXACT else NOTHING, tl.float32))
    state = tl.zeros(there.shape, dtype=tl.float32)
    left = 1.0  # decay from the end of a segment to the beginning of this one
    for other in range(1, count + 1):
        if (left > bound) | (left != left):
            # written by another multiprocessor a moment ago: not from the L1 cache
            piece = tl.load(handed - other * size, mask=there, other=0.0, cache_modifier=".cg")
            state += piece.to(tl.float32) * left
            left *= tl.load(passed - other, cache_modifier=".cg")
    return state, left


# One binary for all sizes: a specialisation saves nothing here and costs seconds of compilation.
@triton.jit(do_not_specialize=["T", "segments", "chunks_per_segment", "sum_steps", "own_chunk", "own_token"])
def _ssd_kernel(
    dt_ptr,
    x,
    B,
    C,
    y,
    x_sum,  # as x and B, in tiles of QS tokens
    B_sum,
    number_sum,  # nums, in tiles of a row of QS tokens; or None
    early_numbers,  # of two rows of Q tokens
    numbers,  # of four rows
    scores,  # C B^T, in tiles of Q x Q, or None
    A_ptr,
    D_ptr,
    z_ptr,
    own_ptr,
    bias_ptr,
    init_ptr,
    final_ptr,
    handed_ptr,
    passed_ptr,
    nums_ptr,
    sync_ptr,
    dealt_ptr,  # who walks what, or None: equal segments
    lead,  # elements between rows of nums
    T,
    H,
    G,
    segments,
    chunks_per_segment,
    sum_steps,
    own_chunk,  # elements of own from a chunk to the next, and from a token
    own_token,
    dt_min,
    dt_max,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_B_b,
    stride_B_t,
    stride_B_g,
    stride_C_b,
    stride_C_t,
    stride_C_g,
    stride_z_b,
    stride_z_t,
    stride_z_h,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    QS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    STEPS: tl.constexpr,
    D_PER_HEAD: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    SPLIT: tl.constexpr,
    RELAXED: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    STAGES: tl.constexpr,
    STEP_STAGES: tl.constexpr,
    LOG_A: tl.constexpr,
    Y_SCALE: tl.constexpr,
    ENGINE: tl.constexpr,
    RUN_ON: tl.constexpr,
    TWICE: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype if DESCRIBED else x.dtype.element_ty
    COMPENSATED: tl.constexpr = dtype == tl.float32
    NUMBERED: tl.constexpr = tl.constexpr(DESCRIBED and not COMPENSATED)  # the numbers come by the copy engine as well
    slices: tl.constexpr = (P + BP - 1) // BP

    # -- which work: slices of P fastest, then heads (they share B and C in the cache), then segments, then the batch
    if SPLIT:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
        if ticket + 1 == tl.num_programs(0):
            tl.store(sync_ptr, 0)  # everybody has one: left as it was found
    else:
        ticket = tl.program_id(0)
    places = segments  # for what a walk's segments hand on
    if dealt_ptr is None:
        slot = ticket % (slices * H)
        rest = ticket // (slices * H)
        seg = rest % segments
        b = rest // segments
        first_chunk = seg * chunks_per_segment
        chunks = tl.minimum(chunks_per_segment, (T + Q - 1) // Q - first_chunk)
        room = segments * chunks_per_segment  # chunks that a walk has room for
    else:
        # As the launch before says: each walk has a number of segments of its own. `segments` are the most that one may
        # have, `chunks_per_segment` those that there are of a sequence, of all its walks.
        if ENGINE and not INTERPRETED:
            gdc_wait()
        dealt = tl.load(dealt_ptr + ticket)
        if dealt < 0:
            return
        slot = dealt & 0xFFFF
        seg = (dealt >> 16) & 0xFF
        segments = dealt >> 24
        b = ticket // chunks_per_segment
        steps = (T + QS - 1) // QS
        first_step = seg * steps // segments
        sum_steps = (seg + 1) * steps // segments - first_step
        first_chunk = first_step * (QS // Q)
        chunks = tl.minimum(sum_steps * (QS // Q), (T + Q - 1) // Q - first_chunk)
        room = steps * (QS // Q)
    part = slot % slices
    h = slot // slices
    g = h // (H // G)

    first = first_chunk * Q  # the segment's first token
    tokens = T - first

    p = part * BP + tl.arange(0, BP)
    # The state is held in PARTS of its columns, which become operands one after the other.
    WN: tl.constexpr = BN // PARTS
    n = tl.arange(0, WN)
    q = tl.arange(0, Q)
    has_p = p < P

    A = tl.load(A_ptr + h).to(tl.float32)
    if LOG_A:
        if COMPENSATED:
            A = tl.exp(A.to(tl.float64)).to(tl.float32)
        else:
            A = tl.exp(A)
        A = -A
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + h).to(tl.float32)

    # -- dt and decays of the whole segment, outside the main loops. Slices of P would write the same: each has its own.
    walk = (tl.cast(b, tl.int64) * H + h) * slices + part
    number = (walk * room + first_chunk) * Q
    nums_ptr += number
    lead = tl.cast(lead, tl.int64)
    place = tl.cast(b * G + g, tl.int64) * ((T + Q - 1) // Q) + first_chunk  # among all groups' chunks
    if own_ptr is not None:
        own_ptr += place * own_chunk
    skip = 0.0
    if D_PER_HEAD:
        skip = tl.load(D_ptr + h).to(tl.float32)
    decay, counted = discretize(
        dt_ptr + tl.cast(b, tl.int64) * stride_dt_b + tl.cast(first, tl.int64) * stride_dt_t + h * stride_dt_h,
        nums_ptr,
        own_ptr,
        lead,
        stride_dt_t,
        own_chunk,
        own_token,
        tokens,
        chunks,
        A,
        bias,
        skip,
        dt_min,
        dt_max,
        SOFTPLUS,
        CLAMP,
        COMPENSATED,
        STEPS,
        SPLIT,
        ENGINE,
        Q,
        R,
    )

    x_column = h * stride_x_h + part * BP
    B_column = g * stride_B_g
    C_column = g * stride_C_g
    width_x = P - part * BP
    state_at = (tl.cast(b, tl.int64) * H + h) * P * N + p[:, None] * N + n[None, :]
    has_state = has_p[:, None] & (n < N)[None, :]
    has_right = has_p[:, None] & (n < N - WN)[None, :]
    state = tl.zeros((BP, WN), dtype=tl.float32)  # [P, N], or the left half of its columns
    right = state

    # -- The state before the segment: the sum of what each segment before it adds, back to one that hands on a whole
    # state, as every SPAN-th does. So a segment waits for first passes, which all end at the same time, and for
    # another's sum only once in SPAN segments.
    if SPLIT:
        row = (tl.cast(b, tl.int64) * H + h) * places + seg
        handed = handed_ptr + row * (P * N) + p[:, None] * N
        passed = passed_ptr + walk * places + seg
        flag = sync_ptr + 1 + walk * places + seg  # counts the segments before that have told this one
        turn = seg % SPAN
        ready = flag + 1 + tl.arange(0, SPAN)
        if seg + 1 < segments:  # what this segment alone adds to the state
            own = tl.zeros((BP, BN), dtype=tl.float32)
            begin = counted // (QS // Q)  # what lies before has decayed by the segment's end
            # Or LLVM has zeros of the sum on a path of their own, and ptxas serialises every wgmma of the kernel.
            tl.assume(begin < sum_steps)
            for i in tl.range(begin, sum_steps, num_stages=STEP_STAGES):
                t = first + i * QS
                if NUMBERED:
                    weight = number_sum.load([SUMMED, tl.cast(number + i * QS, tl.int32)]).reshape(QS)
                else:
                    weight = tl.load(nums_ptr + SUMMED * lead + i * QS + tl.arange(0, QS))
                xT = tl.trans(_tile(x_sum, b, t, x_column, stride_x_b, stride_x_t, T, width_x, QS, BP, DESCRIBED))
                Bc = _tile(B_sum, b, t, B_column, stride_B_b, stride_B_t, T, N, QS, BN, DESCRIBED)  # [QS, N]
                own = finished(own + dot(_weigh(xT, weight), Bc, PRECISION), ENGINE)
            column = tl.arange(0, BN)[None, :]
            tl.store(handed + column, own.to(handed_ptr.dtype.element_ty), mask=has_p[:, None] & (column < N))
            tl.store(passed, power_of_2(decay, COMPENSATED))
            if turn + 1 < SPAN:
                tl.debug_barrier()  # every thread's part is written before the others are told
                told = tl.arange(0, SPAN) < tl.minimum(SPAN - 1 - turn, segments - 1 - seg)
                tl.atomic_add(ready, 1, mask=told, sem="release")
        count = tl.minimum(seg, turn + 1)
        if count > 0:
            arrived = tl.atomic_add(flag, 0, sem="acquire")
            while arrived < count:
                arrived = tl.atomic_add(flag, 0, sem="acquire")
            tl.debug_barrier()
            tl.store(flag, 0)  # left as it was found
        handed += n[None, :]
        state, left = _handed_on(handed, passed, count, P * N, has_state, STEPS, COMPENSATED)
        if PARTS == 2:
            right, left = _handed_on(handed + WN, passed, count, P * N, has_right, STEPS, COMPENSATED)
        if init_ptr is not None:
            if seg < SPAN:
                state += tl.load(init_ptr + state_at, mask=has_state, other=0.0).to(tl.float32) * left
                if PARTS == 2:
                    right += tl.load(init_ptr + state_at + WN, mask=has_right, other=0.0).to(tl.float32) * left
        if dealt_ptr is None:
            if (seg + 1 < segments) & (turn + 1 == SPAN):
                fall = power_of_2(decay, COMPENSATED)
                whole = tl.load(handed, mask=has_state, other=0.0).to(tl.float32) + state * fall
                tl.store(handed, whole.to(handed_ptr.dtype.element_ty), mask=has_state)
                if PARTS == 2:
                    whole = tl.load(handed + WN, mask=has_right, other=0.0).to(tl.float32) + right * fall
                    tl.store(handed + WN, whole.to(handed_ptr.dtype.element_ty), mask=has_right)
                tl.debug_barrier()
                tl.atomic_add(ready, 1, mask=tl.arange(0, SPAN) < segments - 1 - seg, sem="release")
    elif init_ptr is not None:
        state = tl.load(init_ptr + state_at, mask=has_state, other=0.0).to(tl.float32)
        if PARTS == 2:
            right = tl.load(init_ptr + state_at + WN, mask=has_right, other=0.0).to(tl.float32)

    # -- the output
    if D_PER_CHANNEL:
        skip = tl.load(D_ptr + h * P + p, mask=has_p, other=0.0).to(tl.float32)[:, None]
    last_ptr = nums_ptr + CUM * lead + Q - 1
    coming = tl.load(last_ptr)  # a chunk ahead, by hand: Triton would copy it to shared memory, which costs more
    for c in tl.range(0, chunks, num_stages=STAGES):
        t = first + c * Q
        at = nums_ptr + c * Q
        last = coming
        coming = tl.load(last_ptr + (c + 1) * Q)  # past the last one is the next row, not looked at
        low = 0.0
        last_low = 0.0
        low_since = 0.0
        if NUMBERED and TWICE:
            entry, cum = two_rows(early_numbers, ENTRY, tl.cast(number + c * Q, tl.int32), Q)
        elif NUMBERED:
            entry, cum, weight, own = four_rows(numbers, ENTRY, tl.cast(number + c * Q, tl.int32), Q)
        else:
            entry = tl.load(at + ENTRY * lead + q)
            cum = tl.load(at + CUM * lead + q)
        if COMPENSATED:
            low = tl.load(at + LOW * lead + q)
            last_low = tl.load(at + LOW * lead + Q - 1)
            low_since = low[None, :] - low[:, None]
        Bc = _tile(B, b, t, B_column, stride_B_b, stride_B_t, T, N, Q, WN, DESCRIBED)  # [Q, N]
        CT = tl.trans(_tile(C, b, t, C_column, stride_C_b, stride_C_t, T, N, Q, WN, DESCRIBED))  # [N, Q]
        if PARTS == 2:
            B_right = _tile(B, b, t, B_column + WN, stride_B_b, stride_B_t, T, N - WN, Q, WN, DESCRIBED)
            CT_right = tl.trans(_tile(C, b, t, C_column + WN, stride_C_b, stride_C_t, T, N - WN, Q, WN, DESCRIBED))

        # The scores are done with before the state is made an operand: the fewest registers at once.
        causal = q[:, None] <= q[None, :] if COMPENSATED else q[:, None] < q[None, :]  # [s, t]
        if STEPS:
            decayed = exp2(cum[None, :] - cum[:, None], low_since, COMPENSATED) * entry[:, None]
            decayed = tl.where(causal, decayed, 0.0)
        else:
            decayed = tl.exp2(tl.where(causal, cum[None, :] - entry[:, None], float("-inf")))
        if scores is None:
            pairs = dot(Bc, CT, PRECISION)
            if PARTS == 2:
                pairs = _plus(pairs, dot(B_right, CT_right, PRECISION))
        elif DESCRIBED:
            pairs = scores.load([tl.cast((place + c) * Q, tl.int32), 0])
        else:
            pairs = tl.load(scores + (place + c) * (Q * Q) + q[:, None] * Q + q[None, :])
        if RELAXED:
            pairs = pairs.to(dtype).to(tl.float32)
            decayed = decayed.to(dtype).to(tl.float32)
        pairs = (pairs * decayed).to(dtype)  # [s, t]
        if RUN_ON:
            # A product that does not need the state comes first: until then the state's of the chunk before runs on.
            xT = tl.trans(_tile(x, b, t, x_column, stride_x_b, stride_x_t, T, width_x, Q, BP, DESCRIBED))  # [P, Q]
            within = dot(xT, pairs, PRECISION)
            fall = exp2(last, last_low, COMPENSATED)
            yT = dot(state.to(dtype), CT, PRECISION)  # [P, Q], what came before the chunk
            state *= fall  # beside the product
            if PARTS == 2:
                yT += dot(right.to(dtype), CT_right, PRECISION)
                right *= fall
        else:
            yT = dot(state.to(dtype), CT, PRECISION)
            if PARTS == 2:
                yT = _plus(yT, dot(right.to(dtype), CT_right, PRECISION))
        if NUMBERED and TWICE:  # only now in registers
            cum, weight, own, _ = four_rows(numbers, CUM, tl.cast(number + c * Q, tl.int32), Q)
        elif not NUMBERED:
            weight = tl.load(at + LEFT * lead + q)
        since = tl.broadcast_to(exp2(cum, low, COMPENSATED)[None, :], BP, Q)
        if RUN_ON:
            yT = tl.fma(yT, since, within)  # by + and * Triton would make one sum of them, the other way round
        else:
            yT *= since
            xT = tl.trans(_tile(x, b, t, x_column, stride_x_b, stride_x_t, T, width_x, Q, BP, DESCRIBED))
            yT += dot(xT, pairs, PRECISION)
        if not COMPENSATED:
            if not NUMBERED:
                own = tl.load(at + ITSELF * lead + q)
            own = own[None, :]
            yT += xT.to(tl.float32) * (own + skip if D_PER_CHANNEL else own)
        elif D_PER_HEAD or D_PER_CHANNEL:
            yT += xT.to(tl.float32) * skip
        if z_ptr is not None:
            z_at = z_ptr + tl.cast(b, tl.int64) * stride_z_b + tl.cast(t, tl.int64) * stride_z_t + h * stride_z_h
            has_z = (q < T - t)[:, None] & has_p[None, :]
            z = tl.trans(tl.load(z_at + q[:, None] * stride_z_t + p[None, :], mask=has_z, other=0.0).to(tl.float32))
            yT *= z * tl.sigmoid(z)
        weighed = _weigh(xT, weight)
        if RUN_ON:
            state += dot(weighed, Bc, PRECISION)
            if PARTS == 2:
                right += dot(weighed, B_right, PRECISION)
        else:
            fall = exp2(last, last_low, COMPENSATED)
            state = dot(weighed, Bc, PRECISION) + state * fall
            if PARTS == 2:
                right = dot(weighed, B_right, PRECISION) + right * fall
        out = tl.trans((yT * Y_SCALE).to(dtype))
        if DESCRIBED:
            y.store([b, t, h * P + part * BP], out.reshape(1, Q, BP))
        else:
            y_at = y + ((tl.cast(b, tl.int64) * T + t) * H + h) * P + q[:, None] * (H * P) + p[None, :]
            tl.store(y_at, out, mask=(q < T - t)[:, None] & has_p[None, :])

    if STORE_FINAL:
        if seg + 1 == segments:
            tl.store(final_ptr + state_at, state, mask=has_state)
            if PARTS == 2:
                tl.store(final_ptr + state_at + WN, right, mask=has_right)


_launch = Launcher(_ssd_kernel, described=True)


def _describable(tensor: Tensor, block: int) -> bool:
    """Whether (B, T, K, W) can be seen as (B, T, K * W) by a descriptor, in blocks that divide W."""
    size = tensor.dtype.itemsize
    stride_b, stride_t, stride_k, stride_w = tensor.stride()
    width = tensor.shape[3]
    return (
        width % block == 0
        and stride_w == 1
        and stride_k == width
        and (stride_b * size) % 16 == 0
        and (stride_t * size) % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def _described(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """The checks of TensorDescriptor's own constructor cost more than the rest of a launch: callers have made them."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = tensor
    descriptor.shape = shape
    descriptor.strides = strides
    descriptor.block_shape = block
    descriptor.padding = "zero"
    return descriptor


def _descriptor(tensor: Tensor, chunk: int, block: int) -> TensorDescriptor:
    """Of (B, T, K, W) seen as (B, T, K * W), in blocks of a chunk's tokens."""
    shape = [tensor.shape[0], tensor.shape[1], tensor.shape[2] * tensor.shape[3]]
    return _described(tensor, shape, [tensor.stride(0), tensor.stride(1), 1], [1, chunk, block])


def _rows(tensor: Tensor, width: int, rows: int, columns: int) -> TensorDescriptor:
    """Of a contiguous tensor seen as rows of `width`, in blocks of rows and columns."""
    return _described(tensor, [tensor.numel() // width, width], [width, 1], [rows, columns])


def _crowded(config: SsdConfig) -> bool:
    """Whether a thread holds so much of the state that little room is left."""
    return config.block_p * config.block_n >= 4096 * config.warps


def _parts(config: SsdConfig, full: bool) -> int:
    """In how many parts a state becomes an operand; `full` says float32.

    Two, where a thread holds so much of it that the whole one as an operand would leave no room, unless eight warps
    meet for each tile more. In float32 as well, so that sums are shorter.
    """
    return 2 if config.block_n > 128 and (full or (config.warps <= 4 and _crowded(config))) else 1


def _twice(config: SsdConfig, parts: int) -> bool:
    """Whether a chunk's numbers are read in two tiles, so that those needed last take no registers before."""
    return parts == 1 and _crowded(config)


def _runs_on(config: SsdConfig, parts: int) -> bool:
    """Whether there are registers to let the state's product run on into the next chunk."""
    few = config.block_p * config.block_n <= 2048 * config.warps and config.registers == MOST_REGISTERS
    small = config.block_n == 256 and config.chunk <= 32  # what else there is of a chunk, for eight warps
    return config.scores and (few or parts == 2 or small)


def _first_pass(config: SsdConfig, size: int) -> tuple[int, int]:
    """Tokens of a step of the first pass, and steps that are loaded ahead, in half precision with a copy engine.

    Two short chunks at a time, where enough are still loaded ahead to hide the memory's latency. Those of 16 tokens
    always: the copy engine writes to multiples of 128 bytes, and what is loaded ahead of a row of numbers lies behind.
    """
    chunk, stages = config.chunk, config.stages
    if chunk > 32:
        return chunk, stages
    if config.scores:  # x and B have the room of C and scores as well
        each = chunk * (config.block_p + config.block_n) * size
        chunks = stages * (each + chunk * config.block_n * size + 4 * chunk * chunk) // each
        return (2 * chunk, max(1, chunks // 2)) if chunks > 5 or chunk < 32 else (chunk, chunks)
    return (2 * chunk, max(1, stages - 1)) if stages > 3 or chunk < 32 else (chunk, stages)


def ssd(
    config: SsdConfig,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    return_final_states: bool,
    state_dtype: torch.dtype,
    relaxed: bool,
    log_A: bool,
    y_scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch the portable kernel as `config` says; arguments as `fastmamba.kernels.ssd.ssd`."""
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2], B.shape[3]
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)

    new = x.new_empty
    y = new((batch, tokens, heads, head_dim))
    final = new((batch, heads, head_dim, width) if return_final_states else (0,), dtype=torch.float32)
    compensated = x.dtype == torch.float32
    tiles: tuple[Any, ...] = (x, B, C, y)
    parts = _parts(config, compensated)
    part = config.block_n // parts
    blocks = (config.block_p, part, part, config.block_p)
    engine = copy_engine(x.device)
    chunk = config.chunk
    chunks = -(-tokens // chunk)
    slices = -(-head_dim // config.block_p)
    walks = batch * heads * slices
    columns = walks * (chunks + 2 * config.segments) * chunk  # of numbers, at most: a descriptor counts them in 32 bits
    described = engine and columns < 2**31 and all(map(_describable, tiles, blocks))

    deals = not compensated and config.scores and config.blocks > heads * slices and chunks >= 2 * MOST.value
    per_segment = -(-chunks // config.segments)
    step, stages = chunk, config.stages
    if (deals or config.segments > 1) and described and not compensated:
        step, stages = _first_pass(config, x.dtype.itemsize)
        per_segment += per_segment % 2 if step > chunk else 0
    segments = -(-chunks // per_segment)
    grid = walks * segments
    lead = grid * per_segment * chunk
    if deals:  # the most segments that a walk may have, and in place of their length how many there are of all walks
        segments, per_segment = min(MOST.value, config.blocks - heads * slices + 1), config.blocks
        grid = batch * per_segment
        lead = walks * -(-tokens // step) * step

    handed = passed = sync = final  # not looked at unless the sequence is split
    if segments > 1:
        handed = new(batch * heads * segments * head_dim * width, dtype=state_dtype)
        passed = new(walks * segments, dtype=torch.float32)
        sync = zeros_left_as_found(1 + walks * segments, x.device)
    nums = new((5 if segments > 1 else 4) * lead, dtype=torch.float32)
    strides = (*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3])
    steps = tiles[:2]
    if described:
        tiles = tuple(_descriptor(tensor, chunk, block) for tensor, block in zip(tiles, blocks, strict=True))
        if step > chunk or parts > 1:
            steps = _descriptor(x, step, config.block_p), _descriptor(B, step, config.block_n)
        else:
            steps = tiles[:2]
    dealt = apart = own = None
    own_chunk, own_token = chunk, 1
    A = A.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    paces = Steps(dt, A, dt_bias, dt_softplus, dt_min, dt_max, log_A)
    if not compensated and config.scores:
        if deals:
            slots = Slots(heads * slices, slices, heads * slices, heads * slices, 1)
            of = {"groups": groups, "shared": False, "falls": False, "B": B, "C": C, "precision": config.precision}
            found = before(paces, slots, _COSTS, chunk, config.blocks, overlap=engine, **of)
            dealt, apart = found.dealt, found.scores
        else:
            apart = chunk_scores(B, C, chunk, config.block_n, config.precision, overlap=engine)
        own, own_chunk, own_token = apart, chunk * chunk, chunk + 1  # the diagonals
    elif not compensated:
        own = own_scores(B, C, chunks * chunk, config.block_n, overlap=engine)
    twice = _twice(config, parts)
    number_sum = early_numbers = numbers = None
    scores = apart
    if described and not compensated:
        number_sum = _rows(nums, lead, 1, step)
        early_numbers = _rows(nums, lead, 2, chunk) if twice else None
        numbers = _rows(nums, lead, 4, chunk)
        scores = None if apart is None else _rows(apart, chunk, chunk, chunk)
    tensors = (
        dt,
        *tiles,
        *steps,
        number_sum,
        early_numbers,
        numbers,
        scores,
        A,
        None if D is None else D.contiguous(),
        z,
        own,
        dt_bias,
        None if initial_states is None else initial_states.contiguous(),
        final,
        handed,
        passed,
        nums,
        sync,
        dealt,
    )
    values = (
        lead,
        tokens,
        heads,
        groups,
        segments,
        per_segment,
        per_segment * chunk // step,
        own_chunk,
        own_token,
        dt_min,
        dt_max,
        *strides,
        *(z.stride()[:3] if z is not None else (0, 0, 0)),
    )
    constants = (
        head_dim,
        width,
        chunk,
        step,
        config.block_p,
        config.block_n,
        parts,
        config.rows,
        dt_softplus,
        paces.clamped,
        compensated or not dt_min >= 0.0,  # a logarithm needs dt to be positive
        D is not None and D.ndim == 1,
        D is not None and D.ndim == 2,
        return_final_states,
        segments > 1,
        relaxed,
        config.precision,
        described,
        config.stages,
        stages,
        log_A,
        y_scale,
        engine,
        described and not compensated and _runs_on(config, parts),
        twice,
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers < MOST_REGISTERS:
        options["maxnreg"] = config.registers
    if engine and own is not None:
        options["launch_pdl"] = True  # starts beside the launch before it, and waits where it needs that one's
    _launch((grid, 1, 1), tensors, values, constants, **options)
    return y, final
