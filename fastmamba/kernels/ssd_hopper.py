"""The SSD prefill on Hopper: one launch, behind one or two short ones in long calls; blocks are pipelines of warps.

A block owns two slices of 64 channels (two heads, or parts of one), or only one, of one group over one segment of the
sequence, and walks it in chunks of 64 tokens. Its warps have roles, tied together by a ring of shared-memory stages:

    loader    1 warp   copies x, B, C and z of a chunk into a stage (TMA: nothing is read past the end of the sequence)
    decays    1 + 1    turn dt of a head into the running decays that everybody else needs, four chunks at a time
                       (4 warps where a block has one slice: the first chunk waits for them)
    scores    4 warps  C B^T once for the pair, into shared memory: G = (C B^T) * decay below the diagonal, in the dtype
                       of x, and beside it in float32 the diagonal, what a token adds to its own output, plus D
    walkers   4 + 4    one slice each, the state in registers:
                       y^T = S C^T and, beside it, S = S * decay + (x w)^T B, then y^T += x^T G^T + x^T * diagonal
    store     1 warp   sends y on its way to memory (TMA)

For a state of 256 `fastmamba.kernels._ssd_hopper_wide` has other roles: there are no registers for scores.

Everything is transposed (channels are the rows) so that the state and x are register operands of the products and
never go through shared memory. Where batch x heads does not fill the GPU, the sequence is split into segments, and
the walkers first sum up what their segment adds to the state, hand it on, and then walk it again for the output. A
segment sums up what those before it have added, and looks no further back than to one that has handed on a whole state.
What the last segment adds nobody needs, so all blocks share what the others do: each begins some chunks before its
segment, and keeps what it has summed up there for itself. Multiprocessors that would be idle get blocks that lead:
they walk chunks before the first segment, where the state is known, of several blocks' slices one after the other.

A first pass leaves out the chunks of which nothing is left where its part ends, before the segment or in it. So heads
that decay fast have next to none. In long calls a launch before works out what decays over each chunk, and how many
chunks leaders walk of each block's slices: the more, the slower these decay, so that all blocks end together.

Two slices of one head (channels 64 to a slice) share the decays and G, and the two decays warps the work.

Every instruction of the scores role costs a chunk of two slices 2.3 clocks of its 2,460 (one head) or 2,910 (two) on an
H200. Its product a chunk ahead, beside G, made the kernel a tenth slower, though.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastmamba.configs import SsdConfig, multiprocessors
from fastmamba.kernels._before import before
from fastmamba.kernels._dealt import Costs, Slots, Steps
from fastmamba.kernels._launch import Launcher
from fastmamba.kernels._leads import deal_leads
from fastmamba.kernels._scores import chunk_scores
from fastmamba.kernels._ssd_hopper_copies import (
    fence_inits,
    load_first,
    load_role,
    load_second,
    of_first_pass,
    prefetch,
    store_role,
)
from fastmamba.kernels._ssd_hopper_decays import decays_role, load_bits
from fastmamba.kernels._ssd_hopper_handover import _ahead, _ways
from fastmamba.kernels._ssd_hopper_left_out import first_that_count
from fastmamba.kernels._ssd_hopper_roles import scores_role, walk_role
from fastmamba.kernels._ssd_hopper_terms import (
    GROUP,
    MOST_PIECES,
    MOST_UNITS,
    ROWS,
    Q,
    _seen_as,
    _wait_for_launches_before,
    slices_of,
    sync_threads,
)
from fastmamba.kernels._ssd_hopper_wide import _SIZES, _STRIDES, wide_kernel
from fastmamba.kernels._sync import zeros_left_as_found
from fastmamba.ssd_plan import plan, scorers


# One binary for all sizes: a specialisation saves nothing here and costs seconds of compilation.
@gluon.jit(do_not_specialize=[*_SIZES, "parts", "lead", "pieces", *_STRIDES, "stride_x_b", "stride_x_t"])
def _kernel(
    dt_ptr,
    x_desc,
    B_desc,
    C_desc,
    z_desc,
    y_desc,
    A_ptr,
    D_ptr,
    bias_ptr,
    init_ptr,
    final_ptr,
    handed_ptr,
    sync_ptr,
    x_ptr,
    falls_ptr,  # log2 of the decay over each chunk, or None
    leads_ptr,  # chunks that leaders walk of each block's slices, and of how many anything is left; or None
    pieces_ptr,  # what leaders walk, in pieces of `lead` chunks, or None
    T,
    slices,  # of 64 channels, in all heads
    slices_per_group,
    blocks_per_group,
    groups,
    segments,
    chunks_per_segment,
    parts,  # segments of all slices of all sequences
    part_of_group,  # that a block is of its group's, 1 / blocks_per_group
    share,
    part_of_segment,  # that a block is of its segment's
    lead,  # chunks before the first segment, which leaders walk
    pieces,  # of how many blocks a leader walks them
    dt_min,
    dt_max,
    stride_dt_b,
    stride_dt_t,
    stride_dt_h,
    stride_D_h,
    stride_D_p,
    stride_x_b,
    stride_x_t,
    N: gl.constexpr,
    SLICES: gl.constexpr,  # of one head
    PAIR: gl.constexpr,  # slices that a block walks, 1 or 2
    SOFTPLUS: gl.constexpr,
    CLAMP: gl.constexpr,
    GATED: gl.constexpr,
    STORE_FINAL: gl.constexpr,
    SPLIT: gl.constexpr,
    RELAXED: gl.constexpr,
    STAGES: gl.constexpr,
    LOG_A: gl.constexpr,
    Y_SCALE: gl.constexpr,
    PER_CHANNEL: gl.constexpr,  # D
):
    dtype: gl.constexpr = x_desc.dtype
    # Multiprocessors get blocks in this order, the first index fastest: who waits for an earlier segment's block waits
    # for one that has started. And no division of integers: all that a block loads waits for this.
    block = gl.program_id(0)
    total = (T + Q - 1) // Q
    # Decays come for groups of chunks, and a segment begins one: of those before it, the first may lack some chunks.
    STEP: gl.constexpr = 1 if PAIR == 1 else GROUP
    DEALT: gl.constexpr = leads_ptr is not None
    owns: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PIECES: gl.constexpr = MOST_UNITS if DEALT else MOST_PIECES
    facts = gl.allocate_shared_memory(gl.int32, [3 * PAIR, PIECES], owns)  # of a leader's pieces
    listed = facts
    if DEALT:
        _wait_for_launches_before()
    if SPLIT:
        b = gl.program_id(1)
        blocks = groups * blocks_per_group
        seg = ((block.to(gl.float32) + 0.5) * part_of_segment).to(gl.int32)
        block -= seg * blocks
        leads = seg == segments
        own_lead = lead
        if DEALT:
            listed = gl.allocate_shared_memory(gl.int32, [PIECES, 1], owns)
            leaders = gl.num_programs(0) - segments * blocks
            own_pieces = pieces_ptr + (b * leaders + gl.where(leads, block, 0)) * PIECES
            entries = gl.load(own_pieces + gl.arange(0, PIECES, gl.BlockedLayout([1], [32], [4], [0])))
            first_entry = gl.load(own_pieces)
            own_lead = gl.load(leads_ptr + b * blocks + gl.where(leads, 0, block))
            needed = own_lead >> 16
            own_lead = own_lead & 0xFFFF
            _seen_as(listed, gl.int32, [PIECES], owns).store(gl.where(leads, entries, block))
            pieces = gl.where(leads, gl.sum((entries >= 0).to(gl.int32), axis=0), 1)
            block = gl.where(leads, first_entry & 0xFFFF, block)
            each = 1.0 / segments.to(gl.float32)
            chunks_per_segment = ((total - own_lead + segments).to(gl.float32) * each - 0.5 * each).to(gl.int32)
            share = (chunks_per_segment - own_lead).to(gl.float32) * (each / GROUP)
        else:
            block *= gl.where(leads, pieces, 1)
            pieces = gl.where(leads, gl.minimum(pieces, blocks - block), 1)
        begins = own_lead.to(gl.float32) / STEP
        first_chunk = gl.where(leads, 0, own_lead + seg * chunks_per_segment)
    else:
        seg = gl.program_id(1)
        b = gl.program_id(2)
        leads = False
        begins = 0.0
        first_chunk = seg * chunks_per_segment
    last = seg + 1 == segments
    chunks = gl.where(last, total - first_chunk, chunks_per_segment)  # the last one takes what is left
    before = gl.where(leads, 0, _ahead(seg, share, STEP, begins))
    ahead = (before + GROUP - 1) // GROUP * GROUP
    skip = ahead - before
    gap = 0
    reads = 1
    summed = ahead + gl.where(last | leads, 0, chunks - _ahead(seg + 1, share, STEP, begins))
    chunks = gl.where(leads, lead, chunks)
    g, v, second = slices_of(block, part_of_group, blocks_per_group, slices_per_group, PAIR)
    first = first_chunk * Q
    tokens = T - first
    head0 = v // SLICES
    v1 = v + second
    head1 = v1 // SLICES
    if DEALT:
        own = summed - ahead
        from_before, from_own = first_that_count(
            falls_ptr + b.to(gl.int64) * (slices // SLICES * total), head0 * total, head1 * total, first_chunk - before,
            first_chunk, first_chunk + own, needed,
        )  # fmt: skip
        reads = (from_before == first_chunk - before).to(gl.int32)
        before = first_chunk - from_before
        ahead = (before + GROUP - 1) // GROUP * GROUP
        skip = ahead - before
        gap = (from_own - first_chunk) // GROUP * GROUP
        summed = ahead + own - gap

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    # Tiles of B and C of each stage, and from the end on of x and z. The first pass of two slices lasts as long as its
    # loads take: there they are slots for B and, from the end on, for x.
    USED: gl.constexpr = STAGES * (2 * N // Q + PAIR * (2 if GATED else 1))
    TILES: gl.constexpr = (USED + 1) // 2 * 2
    DEEP: gl.constexpr = STAGES if PAIR == 1 else TILES // (N // Q + PAIR)
    FIRST_EACH: gl.constexpr = PAIR if PAIR == 2 or not GATED else 2
    arena = gl.allocate_shared_memory(dtype, [TILES, 1, Q, Q], tile)
    # Two memories: Triton would put a barrier between stores to parts of one.
    square: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    G0 = gl.allocate_shared_memory(dtype, [2, Q, Q], square)
    own0 = gl.allocate_shared_memory(gl.float32, [2, Q], owns)
    G1 = G0
    own1 = own0
    HEADS: gl.constexpr = 2 if PAIR == 2 and SLICES % 2 == 1 else 1  # two slices of one head share all but x
    if HEADS == 2:
        G1 = gl.allocate_shared_memory(dtype, [2, Q, Q], square)
        own1 = gl.allocate_shared_memory(gl.float32, [2, Q], owns)
    ys = gl.allocate_shared_memory(dtype, [2, 1, Q, Q], tile)  # of both slices, or of two chunks
    nums = gl.allocate_shared_memory(gl.float32, [2 * HEADS * ROWS * GROUP, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    dts = gl.allocate_shared_memory(gl.int32, [HEADS, GROUP * Q], owns)  # of the first four chunks
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    begun = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    walked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    came = full
    summed_up = walked
    if PAIR == 2:
        came = gl.allocate_shared_memory(gl.int64, [DEEP, 1], mbarrier.MBarrierLayout())
        summed_up = gl.allocate_shared_memory(gl.int64, [DEEP, 1], mbarrier.MBarrierLayout())
    known = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    unknown = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    walking = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    going = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    unready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    x_at = x_ptr + (b.to(gl.int64) * stride_x_b + first.to(gl.int64) * stride_x_t + v * Q)
    dt_at = dt_ptr + b.to(gl.int64) * stride_dt_b + first.to(gl.int64) * stride_dt_t
    dt0 = dt_at + head0 * stride_dt_h
    dt1 = dt_at + head1 * stride_dt_h
    # What the first chunk waits for is on its way before anything else: dt and A, then x, B and C. A prefetched dt came
    # too late, for whatever reason: the scores' warps, the only ones yet, load it. (Two slices of a whole sequence lost
    # 6% by that.)
    early = gl.arange(0, GROUP * Q, gl.BlockedLayout([1], [32], [4], [0]))
    soon = early + of_first_pass(GROUP, ahead, gap) * Q
    early += of_first_pass(0, ahead, gap) * Q
    soon = gl.minimum(soon, tokens - 1).to(gl.int64) * stride_dt_t
    early = gl.minimum(early, tokens - 1).to(gl.int64) * stride_dt_t
    first_dt0 = 0
    first_dt1 = 0
    if SPLIT or PAIR == 1:
        first_dt0 = load_bits(dt0 + early)
        if HEADS == 2:
            first_dt1 = load_bits(dt1 + early)
    else:
        prefetch(dt0 + early)
    prefetch(A_ptr + head0)
    if bias_ptr is not None:
        prefetch(bias_ptr + head0)
    if SPLIT:
        for i in gl.static_range(DEEP):
            mbarrier.init(came.index(i), count=1)
    else:
        mbarrier.init(full.index(0), count=1)
    mbarrier.init(begun, count=1)
    mbarrier.init(asked, count=1)
    fence_inits(T)
    sync_threads()
    if SPLIT:
        for i in gl.static_range(2):
            t = first + of_first_pass(skip + i, ahead, gap) * Q
            load_first(x_desc, B_desc, arena, came.index(i), i, b, t, v, g, summed > skip + i, N, PAIR, FIRST_EACH)
    else:  # more than one would hold up what is needed first
        load_second(x_desc, B_desc, C_desc, z_desc, arena, full.index(0), 0, b, first, v, g, N, PAIR, GATED)

    if SPLIT or PAIR == 1:
        prefetch(dt0 + soon)

    channels = slices * Q
    state_row = (b.to(gl.int64) * channels + v * Q) * N
    state_row1 = (b.to(gl.int64) * channels + v1 * Q) * N
    handed_row, handed_row1, passed, passed1, flag, flag1 = _ways(
        b, v, v1, slices, seg, segments, parts, handed_ptr, sync_ptr, N
    )
    D0 = head0 * stride_D_h  # where D is not one of each channel
    D1 = head1 * stride_D_h

    # fmt: off
    if PAIR == 2:
        gl.warp_specialize(
            [
                (scores_role, (begun, unready, first_dt0, first_dt1, dts, asked, arena, nums, G0, G1, own0, own1, D_ptr,
                               D0, D1, came, summed_up, full, known, unknown, scored, walked, walking, going, skip,
                               summed, chunks, pieces, block, listed, part_of_group, blocks_per_group, slices_per_group,
                               stride_D_h, N, PAIR, SLICES, RELAXED, SPLIT, STAGES, DEEP, HEADS, PER_CHANNEL,
                               DEALT)),
                (walk_role, (gl.constexpr(0), begun, D_ptr, init_ptr, final_ptr, handed_ptr, passed, flag, arena,
                             nums, G0, own0, ys, came, summed_up, full, known, unknown, scored, walked, unready,
                             walking, going, v, second * 0 + 1, state_row, handed_row, parts, stride_D_h, stride_D_p,
                             seg, segments, reads, ahead, skip, summed, chunks, pieces, block, listed, part_of_group,
                             blocks_per_group, slices_per_group, N, PAIR, SLICES, GATED, STORE_FINAL, SPLIT, STAGES,
                             DEEP, Y_SCALE, HEADS, PER_CHANNEL, DEALT)),
                (walk_role, (gl.constexpr(1), begun, D_ptr, init_ptr, final_ptr, handed_ptr, passed1, flag1, arena,
                             nums, G1, own1, ys, came, summed_up, full, known, unknown, scored, walked, unready,
                             walking, going, v1, second, state_row1, handed_row1, parts, stride_D_h, stride_D_p,
                             seg, segments, reads, ahead, skip, summed, chunks, pieces, block, listed, part_of_group,
                             blocks_per_group, slices_per_group, N, PAIR, SLICES, GATED, STORE_FINAL, SPLIT, STAGES,
                             DEEP, Y_SCALE, HEADS, PER_CHANNEL, DEALT)),
                (load_role, (begun, x_desc, B_desc, C_desc, z_desc, x_at, stride_x_t, tokens, second, arena, came,
                             summed_up, full, walked, walking, going, b, first, v, g, ahead, skip, gap, summed, chunks,
                             pieces, block, listed, part_of_group, blocks_per_group, slices_per_group, N,
                             PAIR, GATED, SPLIT, STAGES, DEEP, FIRST_EACH, DEALT)),
                (decays_role, (gl.constexpr(0), dt0, A_ptr, bias_ptr, head0, nums, known, unknown, stride_dt_t, dt_min,
                               dt_max, tokens, ahead, skip, gap, summed, chunks, pieces, block, listed, part_of_group,
                               blocks_per_group, slices_per_group, stride_dt_h, SOFTPLUS, CLAMP, PAIR, SPLIT, LOG_A,
                               SLICES, HEADS, DEALT, dtype, begun, facts, dts, asked)),
                (decays_role, (gl.constexpr(1), dt1, A_ptr, bias_ptr, head1, nums, known, unknown, stride_dt_t, dt_min,
                               dt_max, tokens, ahead, skip, gap, summed, chunks, pieces, block, listed, part_of_group,
                               blocks_per_group, slices_per_group, stride_dt_h, SOFTPLUS, CLAMP, PAIR, SPLIT, LOG_A,
                               SLICES, HEADS, DEALT, dtype, begun, facts, dts, asked)),
                (store_role, (begun, y_desc, ys, walked, unready, walking, b, first, v, second, skip, summed, chunks,
                              pieces, block, listed, part_of_group, blocks_per_group, slices_per_group,
                              PAIR, SPLIT, STAGES, DEALT)),
            ],
            [4, 4, 1, 1, 1, 1],
            # Nobody spills in a loop, but relaxed scores a number: shared memory leaves the L1 cache next to nothing,
            # and all wait for who does.
            [192, 192, 48, 48, 48, 48],
        )
    else:
        gl.warp_specialize(
            [
                (scores_role, (begun, unready, first_dt0, first_dt1, dts, asked, arena, nums, G0, G1, own0, own1, D_ptr,
                               D0, D1, came, summed_up, full, known, unknown, scored, walked, walking, going, skip,
                               summed, chunks, pieces, block, listed, part_of_group, blocks_per_group, slices_per_group,
                               stride_D_h, N, PAIR, SLICES, RELAXED, SPLIT, STAGES, DEEP, HEADS, PER_CHANNEL,
                               DEALT)),
                (walk_role, (gl.constexpr(0), begun, D_ptr, init_ptr, final_ptr, handed_ptr, passed, flag, arena,
                             nums, G0, own0, ys, came, summed_up, full, known, unknown, scored, walked, unready,
                             walking, going, v, second * 0 + 1, state_row, handed_row, parts, stride_D_h, stride_D_p,
                             seg, segments, reads, ahead, skip, summed, chunks, pieces, block, listed, part_of_group,
                             blocks_per_group, slices_per_group, N, PAIR, SLICES, GATED, STORE_FINAL, SPLIT, STAGES,
                             DEEP, Y_SCALE, HEADS, PER_CHANNEL, DEALT)),
                (decays_role, (gl.constexpr(0), dt0, A_ptr, bias_ptr, head0, nums, known, unknown, stride_dt_t, dt_min,
                               dt_max, tokens, ahead, skip, gap, summed, chunks, pieces, block, listed, part_of_group,
                               blocks_per_group, slices_per_group, stride_dt_h, SOFTPLUS, CLAMP, PAIR, SPLIT, LOG_A,
                               SLICES, HEADS, DEALT, dtype, begun, facts, dts, asked)),
                (load_role, (begun, x_desc, B_desc, C_desc, z_desc, x_at, stride_x_t, tokens, second, arena, came,
                             summed_up, full, walked, walking, going, b, first, v, g, ahead, skip, gap, summed, chunks,
                             pieces, block, listed, part_of_group, blocks_per_group, slices_per_group, N,
                             PAIR, GATED, SPLIT, STAGES, DEEP, FIRST_EACH, DEALT)),
                (store_role, (begun, y_desc, ys, walked, unready, walking, b, first, v, second, skip, summed, chunks,
                              pieces, block, listed, part_of_group, blocks_per_group, slices_per_group,
                              PAIR, SPLIT, STAGES, DEALT)),
            ],
            [4, 4, 1, 1],
            [248, 64, 40, 40],
        )
    # fmt: on


_launch = Launcher(_kernel, described=True)
_launch_wide = Launcher(wide_kernel, described=True)
_WIDE = Costs(first=0.55, start=5.5, handover=1.0, wait=0.48)
"""Of blocks that segments of states of 256 are dealt out to, of 3,270 clocks."""
_TILE = gl.NVMMASharedLayout(128, 16, rank=3)
_FLOATS = gl.NVMMASharedLayout(128, 32, rank=3)


def _descriptor(tensor: Tensor, channels: int, block: int) -> TensorDescriptor:
    """Of a tensor seen as (B, T, channels), in blocks of 64 tokens.

    The checks of TensorDescriptor's own constructor cost more than the rest of a launch; `fastmamba.kernels.ssd` has
    made them.
    """
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = tensor
    descriptor.shape = [tensor.shape[0], tensor.shape[1], channels]
    descriptor.strides = [tensor.stride(0), tensor.stride(1), 1]
    descriptor.block_shape = [1, 64, block]
    descriptor.layout = _TILE if tensor.itemsize == 2 else _FLOATS
    descriptor.padding = "zero"
    return descriptor


def _stages(config: SsdConfig, width: int, gated: bool) -> int:
    """Chunks loaded ahead: those of `config`, which a table may have without a gate in mind, as far as memory goes."""
    if not gated:
        return config.stages
    return min(config.stages, 5 - config.block_slices - (width > 64))


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
    """Launch the Hopper kernel as `config` says; arguments as `fastmamba.kernels.ssd.ssd`, half precision, regular."""
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2], B.shape[3]
    slices = heads * head_dim // 64
    slices_per_group = slices // groups
    wide = width > 128
    block_slices = 2 if wide else config.block_slices
    chunks = -(-tokens // config.chunk)
    available = multiprocessors(x.device)
    planned = plan(
        batch,
        groups,
        slices_per_group,
        chunks,
        config.segments,
        block_slices,
        available,
        wide=wide,
        gated=z is not None,
        one_head=head_dim // 64 % 2 == 0,
        deal=tokens * dt.stride(1) < 1 << 32,  # leads are a third of a sequence at most, and offsets have 32 bits
    )
    blocks_per_group, segments = planned.blocks_per_group, planned.segments

    new = x.new_empty
    y = new(x.shape)
    final = new((batch, heads, head_dim, width) if return_final_states else (1,), dtype=torch.float32)
    handed = sync = dealt = falls = turns = final  # not looked at unless the sequence is split
    A = A.contiguous()
    dt_bias = None if dt_bias is None else dt_bias.contiguous()
    steps = Steps(dt, A, dt_bias, dt_softplus, dt_min, dt_max, log_A)
    scoring = 0
    if segments > 1:
        walks = batch * slices * segments
        # a state that a walker hands on, and one that it keeps for later
        handed = new(walks * (2 * 64 * width + 4 // state_dtype.itemsize), dtype=state_dtype)
        if planned.dealt:
            slots = Slots(groups * blocks_per_group, head_dim // 64, slices_per_group, blocks_per_group, block_slices)
            found = before(
                steps,
                slots,
                _WIDE,
                config.chunk,
                planned.dealt,
                groups=groups,
                shared=True,
                falls=True,
                flags=walks,
                overlap=True,
            )
            dealt, falls, sync = found.dealt, found.falls, found.flags
            turns = zeros_left_as_found(2 * batch, x.device)
        else:
            scoring = scorers(batch, groups, planned, available) if wide else 0
            sync = zeros_left_as_found(walks + (batch * segments if scoring else 0), x.device)
    channels = heads * head_dim
    tensors: tuple[Any, ...] = (
        dt,
        _descriptor(x, channels, 64),
        _descriptor(B, groups * width, width),
        _descriptor(C, groups * width, 64 if wide else width),
        None if z is None else _descriptor(z, channels, 64),
        _descriptor(y, channels, 64),
        A,
        None if D is None else D.contiguous(),
        dt_bias,
        None if initial_states is None else initial_states.contiguous(),
        final,
        handed,
        sync,
    )
    numbers = (
        tokens,
        slices,
        slices_per_group,
        blocks_per_group,
        groups,
        segments,
        planned.per_segment,
    )
    scalars = (
        dt_min,
        dt_max,
        *dt.stride(),
        *((0, 0) if D is None else (1, 0) if D.ndim == 1 else (head_dim, 1)),
    )
    form = (dt_softplus, steps.clamped, z is not None, return_final_states, segments > 1, relaxed)
    numbers += (batch * slices * segments, 1 / blocks_per_group, planned.share)
    if wide:
        scored = scoring > 0 or planned.dealt > 0
        if scored:
            scores = new((batch * groups, chunks * 64, 64), dtype=torch.float32)
        else:
            scores = chunk_scores(C, B, config.chunk, width, config.precision, overlap=True)
            scores = scores.view(batch * groups, chunks * 64, 64)
        tensors = (*tensors, _descriptor(scores, 64, 64), scores)
        tensors += (dealt, falls, turns) if planned.dealt else (None, None, None)
        constants: tuple[Any, ...] = (head_dim // 64, *form, log_A, y_scale, scored, planned.dealt > 0)
        grid = (scoring + groups * blocks_per_group, segments, batch)
        if planned.dealt:
            grid = (planned.dealt, batch, 1)
        numbers = (*numbers, planned.more, scoring, *scalars)
        _launch_wide(grid, tensors, numbers, constants, num_warps=config.warps, launch_pdl=not scoring)
    else:
        stages = _stages(config, width, z is not None)
        per_channel = D is not None and D.ndim == 2
        constants = (width, head_dim // 64, config.block_slices, *form, stages, log_A, y_scale, per_channel)
        blocks = groups * blocks_per_group
        grid = (blocks * segments + planned.leaders, batch, 1) if segments > 1 else (blocks, 1, batch)
        numbers = (
            *numbers,
            1 / blocks,
            planned.unit or planned.lead,
            planned.pieces,
            *scalars,
            x.stride(0),
            x.stride(1),
        )
        leads: tuple[Tensor | None, ...] = (None, None, None)
        if planned.unit:
            leads = deal_leads(
                planned,
                steps,
                chunk=config.chunk,
                slices=head_dim // 64,
                slices_per_group=slices_per_group,
                slots=blocks,
            )
        tensors = (*tensors, x, *leads)
        _launch(grid, tensors, numbers, constants, num_warps=config.warps, launch_pdl=planned.unit > 0)
    return y, final if return_final_states else new(0, dtype=torch.float32)
