"""The SSD on Hopper for a state of 256: blocks of two slices of 64 channels, as in `fastmamba.kernels.ssd_hopper`.

The states of both take all the registers that two walkers can have. So C B^T is worked out once for all heads of a
group: in long sequences by all blocks, by turns, before they walk; in shorter ones that are split, where there is one
group, by blocks on multiprocessors that would be idle, while the others are at their first pass; else by a launch
before this one. In long sequences segments are dealt out by how fast heads decay, and first passes leave out what
nothing is left of: `fastmamba.kernels._ssd_hopper_wide_dealt`. One role of four warps makes all numbers out of C B^T
and dt:

    loader     1 warp   B and C of a chunk into a stage, x of the first ones
    numbers    4 warps  decays, four chunks at a time; G = (C B^T) * decay, while C B^T of the next chunks comes
    walkers    4 + 4    one slice each, the state in registers: y^T = S C^T in quarters of the state, as there are few
                        registers to round it in; then y^T += x^T G^T, and S = S * decay + (x w)^T B beside y's way out;
                        the first of two chunks scales the state for both
    store      1 warp   sends y on its way from where x was, then asks for the next x there, and for z

    came, summed_up     x and B of a chunk of the first pass are there; the walkers are through with them
    walking             the walkers are through with the first pass
    begun, read         C of a chunk is there; the walkers are through with it and with G
    full, walked        x, B and G of a chunk are there; a walker is through with it, and its y is where x was
    known, unknown      the decays of four chunks are there; the walkers are through with them
    scored              B and C of a chunk are there, for its C B^T
    there               C B^T of a chunk is there
    gated, walked       z of a walker's chunk is there
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastmamba.kernels._ssd_hopper_decays import _factor, _from_bits, _numbers, _running, _weights, load_bits
from fastmamba.kernels._ssd_hopper_halves import (
    _halves,
    _packed,
    _product,
    _rounded,
    _silu,
    _split,
    _sum_of_products,
    _widen,
)
from fastmamba.kernels._ssd_hopper_handover import _ahead, _hand_over, _places, _ways
from fastmamba.kernels._ssd_hopper_roles import _fetch
from fastmamba.kernels._ssd_hopper_terms import (
    _CUM,
    _ENTRY,
    _LEFT,
    _SINCE,
    GROUP,
    Q,
    _advance,
    _load,
    _seen_as,
    _wait_for_launches_before,
    sync_threads,
)
from fastmamba.kernels._ssd_hopper_wide_copies import (
    DEEP,
    STAGES,
    N,
    _load_B,
    _load_C,
    _load_first,
    _load_role,
    _load_slice,
    _store_role,
)
from fastmamba.kernels._ssd_hopper_wide_dealt import KEEPS, SKIPS, STORES, _hand_on, _passes, begin_of
from fastmamba.kernels._ssd_hopper_wide_scores import (
    _await_scores,
    _score,
    _score_by_turns,
)

LINE = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))  # dt of four chunks
LEAST = gl.constexpr(-64.0)  # of the logarithm, base 2, of a decay over the second of two chunks: less is taken as this
ROWS = gl.constexpr(4)  # that decays take in shared memory, for each head of a chunk: the last of _SINCE is the total


@gluon.jit
def _total(nums, k: gl.constexpr, buffer, c, layout: gl.constexpr):
    """The decay over chunk c, in the first pass over its four chunks, in all rows: [1]."""
    return _numbers(nums, k, buffer, c, _SINCE, ROWS).slice(Q - 1, 1).load(layout)


@gluon.jit
def _over_two(nums, k: gl.constexpr, buffer, c, dtype: gl.constexpr, layout: gl.constexpr):
    """What the state is multiplied by in chunk c, the first of two: [1]. In float16, the decay over each chunk."""
    last = _numbers(nums, k, buffer, c, _CUM, ROWS).slice(Q - 1, 1).load(layout)
    if dtype == gl.bfloat16:
        last += gl.maximum(_numbers(nums, k, buffer, c + 1, _CUM, ROWS).slice(Q - 1, 1).load(layout), LEAST)
    return gl.exp2(last)


@gluon.jit
def _decays(
    k: gl.constexpr, i, first_pass, dt, bias, A, nums, halves, buffer, t, tokens, dt_min, dt_max, summed, chunk, ahead,
    gap, SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, DEALT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Those of the block's head k in the i-th four chunks of both passes, as `decays_role` works them out."""
    dt, cum, entry = _running(dt.to(gl.float32) + bias, A, t, tokens, dt_min, dt_max, SOFTPLUS, CLAMP)
    last = gl.sum(dt * A, axis=1)
    since = cum
    if i < first_pass:  # the decays of later chunks of the four are part of the weights
        rest = last
        whole = last
        for j in gl.static_range(GROUP):
            later = gl.sum(gl.where(chunk == j, last, 0.0), axis=0)
            there = i * GROUP + j < summed
            rest += gl.where((chunk < j) & there, later, 0.0)
            whole += gl.where((chunk != j) & there, later, 0.0)
        if DEALT:  # nothing is left of what came before a gap
            whole = gl.where((gap > 0) & (i * GROUP == ahead), float("-inf"), whole)
        last = rest
        since = cum * 0.0 + whole[:, None]
    elif dtype == gl.bfloat16:  # in the first of two chunks the decay of the second one is
        everywhere: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([GROUP, 1], [1, 32], [1, 4], [1, 0]))
        lasts = gl.convert_layout(last, everywhere)
        each = gl.arange(0, GROUP, everywhere)
        later1 = gl.sum(gl.where(each == 1, gl.maximum(lasts, LEAST), 0.0), axis=0)
        later3 = gl.sum(gl.where(each == 3, gl.maximum(lasts, LEAST), 0.0), axis=0)
        since -= gl.where(chunk % 2 == 1, gl.maximum(last, LEAST), 0.0)[:, None]
        last += gl.where(chunk == 0, later1, gl.where(chunk == 2, later3, 0.0))
    row = (k * 2 + buffer) * ROWS
    nums.index(row + _CUM).store(cum)
    nums.index(row + _ENTRY).store(entry)
    nums.index(row + _SINCE).store(gl.exp2(since))
    value, rest = _split(gl.exp2(last[:, None] - entry), dtype)
    halves.index(2 * (row + _LEFT)).store(value)
    halves.index(2 * (row + _LEFT) + 1).store(rest)


@gluon.jit
def _decayed(scores, cum, entry, dtype: gl.constexpr, RELAXED: gl.constexpr):
    """A tile of G, two neighbours in an int32; anything above the diagonal, where the decay may be infinite."""
    decay = gl.exp2(cum[:, None] - entry[None, :])
    if RELAXED:
        return _packed(scores.to(dtype) * decay.to(dtype))
    else:
        return _rounded(scores * decay, dtype)


@gluon.jit
def _numbers_role(
    dt0, dt1, first_dt0, first_dt1, A0, A1, bias_ptr, bias0, bias1, scores_desc, arena, there, sequence, first, nums,
    known, unknown, full, read, walking, done_ptr, scorers, readers, stride_dt_t, dt_min, dt_max, tokens, ahead,
    summed, chunks, gap,
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, SPLIT: gl.constexpr, RELAXED: gl.constexpr, LOG_A: gl.constexpr,
    dtype: gl.constexpr, HEADS: gl.constexpr, PLACES: gl.constexpr, COMING: gl.constexpr, SCORING: gl.constexpr,
    DEALT: gl.constexpr,
):  # fmt: skip
    line: gl.constexpr = LINE
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    halves = _seen_as(nums, dtype, [4 * HEADS * ROWS, GROUP, Q], rows)
    grouped = _seen_as(nums, gl.float32, [2 * HEADS * ROWS, GROUP, Q], rows)
    chunk = gl.arange(0, GROUP, gl.SliceLayout(1, line))
    q = chunk[:, None] * Q + gl.arange(0, Q, gl.SliceLayout(0, line))[None, :]  # [GROUP, Q]
    first_pass = (summed + GROUP - 1) // GROUP
    groups = first_pass + (chunks + GROUP - 1) // GROUP
    after = -ahead
    if DEALT:
        after += gl.where((ahead == 0) & (summed > 0), gap, 0)
    after = after * Q + q
    element: gl.constexpr = dt0.dtype.element_ty
    coming0 = _from_bits(first_dt0, element).to(element)
    A0 = _factor(A0, LOG_A)
    if bias_ptr is not None:
        bias0 = bias0.to(gl.float32)
    if HEADS == 2:
        coming1 = _from_bits(first_dt1, element).to(element)
        A1 = _factor(A1, LOG_A)
        if bias_ptr is not None:
            bias1 = bias1.to(gl.float32)

    TILE: gl.constexpr = 32  # rows and columns of G at a time: there are few registers
    FIRST: gl.constexpr = (4 + HEADS * PLACES) // 2  # place of C B^T
    TILES: gl.constexpr = arena.shape[0]
    products = _seen_as(arena, gl.float32, [TILES // 2, 1, Q, Q], gl.NVMMASharedLayout(128, 32, rank=3))
    Gs = _seen_as(arena, dtype, [TILES, Q, Q], gl.NVMMASharedLayout(128, 16, rank=2))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    t = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    s = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    causal = _packed(gl.where(t[:, None] >= s[None, :], -1, 0).to(gl.int16))  # in the tiles on the diagonal
    # G lags two chunks behind, so that nobody waits for the decays of the next four.
    for i in range(groups + 1):
        if i < groups:
            buffer = i & 1
            mbarrier.wait(unknown.index(buffer), (i // 2 & 1) ^ 1)
            at = after
            after = gl.where(i + 1 < first_pass, (i + 1) * GROUP - ahead, (i + 1 - first_pass) * GROUP)
            if DEALT:
                after += gl.where((i + 1 < first_pass) & ((i + 1) * GROUP >= ahead), gap, 0)
            after = after * Q + q
            dt = coming0
            coming0 = gl.load(dt0 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
            _decays(0, i, first_pass, dt, bias0, A0, grouped, halves, buffer, at, tokens, dt_min, dt_max, summed, chunk,
                    ahead, gap, SOFTPLUS, CLAMP, DEALT, dtype)  # fmt: skip
            if HEADS == 2:
                dt = coming1
                coming1 = gl.load(dt1 + after.to(gl.int64) * stride_dt_t, mask=after < tokens, other=0.0)
                _decays(1, i, first_pass, dt, bias1, A1, grouped, halves, buffer, at, tokens, dt_min, dt_max, summed,
                        chunk, ahead, gap, SOFTPLUS, CLAMP, DEALT, dtype)  # fmt: skip
            mbarrier.arrive(known.index(buffer), count=1)
        if i == first_pass:
            if SPLIT:
                mbarrier.wait(walking, 0)  # until then x lies here
            if SCORING:
                _await_scores(done_ptr, scorers, readers)
            else:
                _wait_for_launches_before()
            for n in gl.static_range(COMING):
                mbarrier.expect(there.index(n), Q * Q * 4, pred=n < chunks)
                _load(scores_desc, [sequence, first + n * Q, 0], there.index(n), products.index(FIRST + n),
                      pred=n < chunks)  # fmt: skip
        begin = gl.maximum((i - first_pass) * GROUP - 2, 0)
        for c in range(begin, gl.minimum(gl.maximum((i - first_pass) * GROUP + 2, 0), chunks)):
            group = (first_pass + c // GROUP) & 1
            # the chunk whose G was in the same place
            mbarrier.wait(read.index((c + STAGES - PLACES) % STAGES), (c - PLACES) // STAGES & 1, pred=c >= PLACES)
            mbarrier.wait(there.index(c % COMING), c // COMING & 1)
            tile = products.index(FIRST + c % COMING).reshape([Q, Q])
            for row in gl.static_range(2):
                scores = tile.slice(row * TILE, TILE).slice(0, TILE, dim=1).load(layout)  # [t, s]
                if row == 1:
                    later = tile.slice(TILE, TILE).slice(TILE, TILE, dim=1).load(layout)
                for k in gl.static_range(HEADS):
                    cum = _numbers(nums, k, group, c, _CUM, ROWS).slice(row * TILE, TILE)
                    cum = cum.load(gl.SliceLayout(1, layout))
                    entries = _numbers(nums, k, group, c, _ENTRY, ROWS)
                    G = _decayed(scores, cum, entries.slice(0, TILE).load(gl.SliceLayout(0, layout)), dtype, RELAXED)
                    if row == 0:
                        G &= causal
                        beside = gl.zeros_like(G)  # above the diagonal
                    else:
                        entry = entries.slice(TILE, TILE).load(gl.SliceLayout(0, layout))
                        beside = _decayed(later, cum, entry, dtype, RELAXED) & causal
                    G = _halves(gl.join(G, beside).permute([0, 2, 1]).reshape([TILE, TILE]), dtype)
                    Gs.index(4 + k * PLACES + c % PLACES).slice(row * TILE, TILE).store(G)
            fence_async_shared()
            mbarrier.arrive(full.index(c % STAGES), count=1)
            next = c + COMING
            mbarrier.expect(there.index(c % COMING), Q * Q * 4, pred=next < chunks)
            _load(scores_desc, [sequence, first + next * Q, 0], there.index(c % COMING),
                  products.index(FIRST + c % COMING), pred=next < chunks)  # fmt: skip


@gluon.jit
def _columns(v, W: gl.constexpr):
    """The first and the last columns of [Q, W]."""
    return v.reshape([Q, 2, W // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _walk_role(
    k: gl.constexpr,
    D_ptr, D_at, init_ptr, final_ptr, handed_ptr, passed_ptr, flag_ptr, xs, Bs, Cs, zs, nums, came, summed_up,
    begun, read, full, known, unknown, walked, gated, walking,
    there,  # whether the slice is: a group of an odd number of slices leaves one over
    state_row, handed_row,
    parts,  # of all blocks
    stride_D_p, seg, segments, ahead, summed, chunks, links,
    GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr, DEALT: gl.constexpr, Y_SCALE: gl.constexpr,
    HEADS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    head: gl.constexpr = k if HEADS == 2 else 0
    PIPED: gl.constexpr = HEADS == 1
    dtype: gl.constexpr = Bs.dtype
    TILES: gl.constexpr = xs.shape[0]
    Gs = _seen_as(xs, dtype, [TILES, Q, Q], gl.NVMMASharedLayout(128, 16, rank=2))
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    # ptxas takes no product of 256 columns in a kernel of 512 threads
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    narrow: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    p = gl.arange(0, Q, gl.SliceLayout(1, wide))
    n = gl.arange(0, N, gl.SliceLayout(0, wide))
    at = p[:, None] * N + n[None, :]
    state = gl.zeros((Q, N), gl.float32, wide)
    group = 0
    turn = 0
    if SPLIT:
        decay = gl.full([1], 1.0, gl.float32, gl.SliceLayout(1, wide))
        before_segment = decay
        element: gl.constexpr = handed_ptr.dtype.element_ty
        kept = handed_ptr + parts.to(gl.int64) * (Q * N) + handed_row
        skip = links >> SKIPS & 3 if DEALT else 0  # places are counted without them
        xT = _fetch(k, xs, came, 0, 0, summed > 0, 2, narrow)
        mbarrier.wait(known.index(group), turn)
        left, rest = _weights(nums, head, group, skip, dtype, gl.SliceLayout(0, narrow), ROWS)
        part = _product(xT, rest[None, :])
        total = _total(nums, head, group, skip, gl.SliceLayout(1, wide))
        for half in gl.static_range(2):  # up to where the segment begins, and on from there
            for c in range(skip if half == 0 else ahead, ahead if half == 0 else summed):
                if c % GROUP == 0:
                    decay *= total
                    state *= total[:, None]
                weighted = _sum_of_products(xT, left[None, :], part)
                sum = warpgroup_mma(weighted, Bs.index((c - skip) % DEEP).reshape([Q, N]), state, is_async=True)
                last = (c % GROUP == GROUP - 1) | (c + 1 == summed)
                unneeded = group
                if last:
                    group, turn = _advance(group, turn, 2)
                # While the product runs, all but the last: what ptxas sees written while one runs, it waits for.
                after = c + 1
                place = after - skip
                xT = _fetch(k, xs, came, place % DEEP, place // DEEP & 1, after < summed, 2, narrow)
                mbarrier.wait(known.index(group), turn, pred=last & (after < summed))
                there_are = gl.where(after < summed, group, unneeded)  # numbers: after the last chunk nobody needs any
                after = gl.where(after < summed, after, c)
                left, rest = _weights(nums, head, there_are, after, dtype, gl.SliceLayout(0, narrow), ROWS)
                part = _product(xT, rest[None, :])
                total = _total(nums, head, there_are, after, gl.SliceLayout(1, wide))
                state = warpgroup_mma_wait(0, [sum])
                mbarrier.arrive(summed_up.index((c - skip) % DEEP), count=1)
                if last:
                    mbarrier.arrive(unknown.index(unneeded), count=1)
            if half == 0:
                before_segment = decay
                if (
                    links & KEEPS != 0 if DEALT else (there != 0) & (ahead > 0)
                ):  # what of the segment's first state this block itself has summed up
                    gl.store(_places(kept, N, wide), state.to(element))
        mbarrier.arrive(walking, count=1)
        if DEALT:
            state = _hand_on(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row,
                             links, N, kept, before_segment)  # fmt: skip
        elif there != 0:
            state = _hand_over(state, decay, at, init_ptr, handed_ptr, handed_row, passed_ptr, flag_ptr, state_row, seg,
                               segments, N, kept, before_segment, ahead)  # fmt: skip
    elif init_ptr is not None:
        if there != 0:
            state = gl.load(init_ptr + state_row + at).to(gl.float32)

    if D_ptr is not None:
        D = gl.load(D_ptr + D_at + gl.arange(0, Q, gl.SliceLayout(1, mma)) * stride_D_p).to(gl.float32)
    halves = _columns(state, N)
    low = gl.convert_layout(halves[0], wide, assert_trivial=True)
    high = gl.convert_layout(halves[1], wide, assert_trivial=True)
    B_halves = _seen_as(Cs, dtype, [4 * STAGES, 1, Q, N // 2], gl.NVMMASharedLayout(128, 16, rank=3))
    mbarrier.wait(begun.index(0), 0)
    mbarrier.wait(known.index(group), turn)
    for c in range(chunks):
        stage = c % STAGES
        y = gl.zeros((Q, Q), gl.float32, mma)
        for quarter in gl.static_range(4):
            before = _columns(low if quarter < 2 else high, N // 2)[quarter % 2]
            before = gl.convert_layout(before.to(dtype), narrow)
            C = Cs.index(4 * (STAGES + stage) + quarter).reshape([Q, Q])
            y = warpgroup_mma(before, C.permute([1, 0]), y, use_acc=quarter > 0, is_async=True)
            if PIPED:  # there are registers for two quarters
                if quarter == 1 or quarter == 2:
                    y = warpgroup_mma_wait(1, [y])
            elif quarter < 3:
                y = warpgroup_mma_wait(0, [y])
        mbarrier.wait(full.index(stage), c // STAGES & 1)
        y = warpgroup_mma_wait(0, [y])
        xT = xs.index(stage * 2 + k).reshape([Q, Q]).permute([1, 0]).load(narrow)
        y = y * _numbers(nums, head, group, c, _SINCE, ROWS).load(gl.SliceLayout(0, mma))[None, :]
        if D_ptr is not None:
            y += gl.convert_layout(_widen(xT), mma) * D[:, None]
        G = Gs.index(4 + head * PLACES + c % PLACES)
        y = warpgroup_mma(xT, G.permute([1, 0]), y, is_async=True)
        if (dtype != gl.bfloat16) | (c % 2 == 0):
            total = _over_two(nums, head, group, c, dtype, gl.SliceLayout(1, wide))
            low *= total[:, None]
            high *= total[:, None]
        if not PIPED:
            y = warpgroup_mma_wait(0, [y])
        value, rest = _weights(nums, head, group, c, dtype, gl.SliceLayout(0, narrow), ROWS)
        weighted = _sum_of_products(xT, value[None, :], _product(xT, rest[None, :]))
        if PIPED:
            y = warpgroup_mma_wait(0, [y])
        mbarrier.arrive(read.index(stage), count=1)
        sum_low = warpgroup_mma(weighted, B_halves.index(2 * stage).reshape([Q, N // 2]), low, is_async=True)
        sum_high = warpgroup_mma(weighted, B_halves.index(2 * stage + 1).reshape([Q, N // 2]), high, is_async=True)
        # in the shadow of the state's products
        coming = c + 1
        last = coming % GROUP == 0
        unneeded = group
        if last:
            group, turn = _advance(group, turn, 2)
        mbarrier.wait(begun.index(coming % STAGES), coming // STAGES & 1, pred=coming < chunks)
        mbarrier.wait(known.index(group), turn, pred=last & (coming < chunks))
        # Behind these waits, over which ptxas moves nothing: it would round y before the products.
        if GATED:
            mbarrier.wait(gated.index(k), c & 1)
            z = zs.index(k).reshape([Q, Q]).permute([1, 0]).load(narrow)
            y *= _silu(gl.convert_layout(z, mma).to(gl.float32))
        xs.index(stage * 2 + k).reshape([Q, Q]).permute([1, 0]).store((y * Y_SCALE).to(dtype))
        low, high = warpgroup_mma_wait(0, [sum_low, sum_high])  # pyrefly: ignore
        mbarrier.arrive(walked.index(2 * stage + k), count=1)
        if last:
            mbarrier.arrive(unknown.index(unneeded), count=1)
    if STORE_FINAL:
        if links & STORES != 0 if DEALT else (there != 0) & (seg + 1 == segments):
            state = gl.join(low, high).permute([0, 2, 1]).reshape([Q, N])
            state = gl.convert_layout(state, wide, assert_trivial=True)
            gl.store(gl.max_contiguous(gl.multiple_of(final_ptr + state_row + at, [8, 8]), [1, 8]), state)


@gluon.jit
def _inits(
    came, summed_up, begun, read, full, walked, known, unknown, there, gated, walking, scored,
    SPLIT: gl.constexpr,
    ALL: gl.constexpr,  # or all but those of the first chunk's loads, which are under way
):  # fmt: skip
    for i in gl.static_range(DEEP):  # one of a kind at a time: Triton puts a barrier between two
        if SPLIT:
            if ALL or i > 0:
                mbarrier.init(came.index(i), count=1)
            mbarrier.init(summed_up.index(i), count=2)  # the walkers
        mbarrier.init(walked.index(i), count=1)
        if i < 2:
            if SPLIT or i > 0:
                mbarrier.init(begun.index(i), count=1)
                mbarrier.init(full.index(i), count=4)  # B, x of both walkers, G
            mbarrier.init(read.index(i), count=2)
            mbarrier.init(known.index(i), count=1)
            mbarrier.init(unknown.index(i), count=2)
            mbarrier.init(there.index(i), count=1)
            mbarrier.init(gated.index(i), count=1)
            if ALL:
                mbarrier.init(scored.index(i), count=1)
    mbarrier.init(walking, count=2)
    fence_async_shared()


_SIZES = ["T", "slices", "slices_per_group", "blocks_per_group", "groups", "segments", "chunks_per_segment"]
_STRIDES = ["stride_dt_b", "stride_dt_t", "stride_dt_h", "stride_D_h", "stride_D_p"]


@gluon.jit(do_not_specialize=[*_SIZES, "parts", "more", "scorers", *_STRIDES])
def wide_kernel(
    dt_ptr, x_desc, B_desc, C_desc, z_desc, y_desc, A_ptr, D_ptr, bias_ptr, init_ptr, final_ptr, handed_ptr, sync_ptr,
    scores_desc,  # C B^T of all chunks, (batch * groups, chunks * t, s)
    scores_ptr,
    dealt_ptr,  # of each block of a sequence, what it walks: (batch, blocks); None where segments are equal
    falls_ptr,  # log2 of the decay over each chunk: (batch, heads, chunks)
    turns_ptr,  # of each sequence, how often blocks that score are through with a turn, and have asked for one
    T,
    slices,  # of 64 channels, in all heads
    slices_per_group,
    blocks_per_group,
    groups,
    segments,  # where they are dealt out, how many of a slice there are places for
    chunks_per_segment,
    parts,  # segments of all slices of all sequences
    part_of_group,  # that a block is of its group's, 1 / blocks_per_group
    share,
    more,  # chunks of the first segment, which looks back to nobody
    scorers,  # blocks of a segment that work out its scores, before those that walk
    dt_min, dt_max, stride_dt_b, stride_dt_t, stride_dt_h, stride_D_h, stride_D_p,
    SLICES: gl.constexpr,  # of one head
    SOFTPLUS: gl.constexpr, CLAMP: gl.constexpr, GATED: gl.constexpr, STORE_FINAL: gl.constexpr, SPLIT: gl.constexpr,
    RELAXED: gl.constexpr, LOG_A: gl.constexpr, Y_SCALE: gl.constexpr,
    SCORING: gl.constexpr,  # whether blocks work out scores
    DEALT: gl.constexpr,  # whether segments are dealt out, by a launch before this one
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    HEADS: gl.constexpr = 2 if SLICES % 2 == 1 else 1  # two slices of one head share all but x
    PLACES: gl.constexpr = 1 if GATED and HEADS == 2 else 2  # for G of a head: shared memory is full
    COMING: gl.constexpr = 1 if GATED or HEADS == 2 else 2  # and for C B^T

    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    lone: gl.constexpr = mbarrier.MBarrierLayout()
    quarters = gl.allocate_shared_memory(dtype, [2 * STAGES * 4, 1, Q, Q], tile)  # B of each stage, then C
    Bs = _seen_as(quarters, dtype, [2 * STAGES, 1, Q, N], tile)
    # x of each stage, later y; G of each head; C B^T. All of it is x in the first pass.
    xs = gl.allocate_shared_memory(dtype, [4 + HEADS * PLACES + 2 * COMING, 1, Q, Q], tile)
    zs = xs
    if GATED:
        zs = gl.allocate_shared_memory(dtype, [2, 1, Q, Q], tile)
    nums = gl.allocate_shared_memory(gl.float32, [2 * HEADS * ROWS * GROUP, Q], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    came = gl.allocate_shared_memory(gl.int64, [DEEP, 1], lone)
    summed_up = gl.allocate_shared_memory(gl.int64, [DEEP, 1], lone)
    begun = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)
    walked = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], lone)
    known = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    unknown = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    there = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    gated = gl.allocate_shared_memory(gl.int64, [2, 1], lone)
    walking = gl.allocate_shared_memory(gl.int64, [1], lone)
    scored = begun
    if DEALT:
        scored = gl.allocate_shared_memory(gl.int64, [STAGES, 1], lone)

    # as in `fastmamba.kernels.ssd_hopper`
    block = gl.program_id(0)
    total = (T + Q - 1) // Q
    gap = gl.constexpr(0)
    links = gl.constexpr(0)
    links1 = gl.constexpr(0)
    places = segments
    if DEALT:
        b = gl.program_id(1)
        _inits(came, summed_up, begun, read, full, walked, known, unknown, there, gated, walking, scored, True, True)
        readers = gl.num_programs(0)
        done = turns_ptr + 2 * b
        each = (groups * total + readers - 1) // readers
        scorers = (groups * total + each - 1) // each
        sync_threads()
        _score_by_turns(
            B_desc, C_desc, scores_ptr, done + 1, done, Bs, quarters, scored, b, scorers, each, total, groups
        )
        _wait_for_launches_before()
        entry = gl.load(dealt_ptr + (b * readers + block))
        if entry < 0:
            _await_scores(done, scorers, readers)
            return
        block = entry & 0xFFFF
        seg = entry >> 16 & 0xFF
        segments = entry >> 24
    else:
        done = sync_ptr
        readers = 0
        if SCORING:
            block -= scorers
        seg = gl.program_id(1)
        b = gl.program_id(2)
    g = ((block.to(gl.float32) + 0.5) * part_of_group).to(gl.int32)
    place = (block - g * blocks_per_group) * 2
    v = g * slices_per_group + place
    second = (place + 1 < slices_per_group).to(gl.int32)
    head0 = v // SLICES
    v1 = v + second
    head1 = v1 // SLICES

    if DEALT:
        first_chunk = begin_of(seg, segments, total)
        chunks = begin_of(seg + 1, segments, total) - first_chunk
        falls = falls_ptr + (b.to(gl.int64) * (slices // SLICES) + head0) * total
        ahead, summed, gap, links = _passes(falls, (head1 - head0) * total, seg, segments, total, HEADS)
    else:
        first_chunk = seg * chunks_per_segment + gl.where(seg > 0, more, 0)
        last = seg + 1 == segments
        chunks = chunks_per_segment + gl.where(seg == 0, more, 0)
        chunks = gl.where(last, total - first_chunk, chunks)  # the last one takes what is left
        begins = more.to(gl.float32) / GROUP
        ahead = gl.where(seg > 0, _ahead(seg, share, first=begins), 0)
        summed = ahead + gl.where(last, 0, chunks - _ahead(seg + 1, share, first=begins))
    if DEALT:  # what is not there hands nothing on and stores nothing, but goes along
        links1 = gl.where(second != 0, links, links & (3 << SKIPS))
    first = first_chunk * Q
    tokens = T - first
    if SCORING and not DEALT:
        readers = blocks_per_group
        done = sync_ptr + parts + b * segments + seg
        if block < 0:
            for i in gl.static_range(STAGES):
                mbarrier.init(begun.index(i), count=1)
            fence_async_shared()
            sync_threads()
            _score(B_desc, C_desc, scores_ptr, Bs, quarters, begun, 0, b, first_chunk + block + scorers,
                   first_chunk + chunks, scorers, total, groups)  # fmt: skip
            gl.atomic_add(done, 1, sem="release")
            return
    # All that the first decays wait for is loaded before there are roles.
    A0 = gl.load(A_ptr + head0)
    A1 = A0
    bias0 = 0.0
    bias1 = 0.0
    if bias_ptr is not None:
        bias0 = gl.load(bias_ptr + head0)
    if HEADS == 2:
        A1 = gl.load(A_ptr + head1)
        if bias_ptr is not None:
            bias1 = gl.load(bias_ptr + head1)
    dt_at = dt_ptr + b.to(gl.int64) * stride_dt_b + first.to(gl.int64) * stride_dt_t
    dt0 = dt_at + head0 * stride_dt_h
    dt1 = dt_at + head1 * stride_dt_h
    skip = gl.constexpr(0)
    begin = -ahead
    if DEALT:
        skip = links >> SKIPS & 3
        begin += gl.where((ahead == 0) & (summed > 0), gap, 0)
    early = begin * Q + gl.arange(0, GROUP, gl.SliceLayout(1, LINE))[:, None] * Q
    early = gl.minimum(early + gl.arange(0, Q, gl.SliceLayout(0, LINE))[None, :], tokens - 1).to(gl.int64) * stride_dt_t
    first_dt0 = load_bits(dt0 + early)
    first_dt1 = 0
    if HEADS == 2:
        first_dt1 = load_bits(dt1 + early)
    if SPLIT:
        if DEALT:
            sync_threads()
        else:
            mbarrier.init(came.index(0), count=1)
            fence_async_shared()
            sync_threads()
        _load_first(x_desc, B_desc, xs, Bs, came.index(0), 0, b, first + (begin + skip) * Q, v, g, summed > 0)
        if DEALT:
            t = first + (skip + 1 - ahead + gl.where(skip + 1 < ahead, 0, gap)) * Q
            _load_first(x_desc, B_desc, xs, Bs, came.index(1), 1, b, t, v, g, skip + 1 < summed)
    else:
        mbarrier.init(begun.index(0), count=1)
        mbarrier.init(full.index(0), count=4)
        fence_async_shared()
        sync_threads()
        _load_C(C_desc, quarters, begun.index(0), 0, b, first, g)
        for k in gl.static_range(2):
            _load_slice(x_desc, xs, full.index(0), k, b, first, v + k)
        _load_B(B_desc, Bs, full.index(0), 0, b, first, g)
    if not DEALT:
        _inits(came, summed_up, begun, read, full, walked, known, unknown, there, gated, walking, scored, SPLIT, False)
        sync_threads()

    state_row = (b.to(gl.int64) * slices + v) * (Q * N)
    state_row1 = (b.to(gl.int64) * slices + v1) * (Q * N)
    handed_row, handed_row1, passed, passed1, flag, flag1 = _ways(
        b, v, v1, slices, seg, places, parts, handed_ptr, sync_ptr, N
    )
    D0 = head0 * stride_D_h + v % SLICES * Q * stride_D_p
    D1 = head1 * stride_D_h + v1 % SLICES * Q * stride_D_p

    # fmt: off
    gl.warp_specialize(
        [
            (_numbers_role, (dt0, dt1, first_dt0, first_dt1, A0, A1, bias_ptr, bias0, bias1, scores_desc, xs, there,
                             b * groups + g, first, nums, known, unknown, full, read, walking, done, scorers, readers,
                             stride_dt_t, dt_min, dt_max, tokens, ahead, summed, chunks, gap, SOFTPLUS, CLAMP, SPLIT,
                             RELAXED, LOG_A, dtype, HEADS, PLACES, COMING, SCORING, DEALT)),
            (_walk_role, (gl.constexpr(0), D_ptr, D0, init_ptr, final_ptr, handed_ptr, passed, flag, xs, Bs, quarters,
                          zs, nums, came, summed_up, begun, read, full, known, unknown, walked, gated, walking,
                          second * 0 + 1, state_row, handed_row, parts, stride_D_p, seg, segments, ahead, summed,
                          chunks, links, GATED, STORE_FINAL, SPLIT, DEALT, Y_SCALE, HEADS, PLACES)),
            (_walk_role, (gl.constexpr(1), D_ptr, D1, init_ptr, final_ptr, handed_ptr, passed1, flag1, xs, Bs, quarters,
                          zs, nums, came, summed_up, begun, read, full, known, unknown, walked, gated, walking,
                          second, state_row1, handed_row1, parts, stride_D_p, seg, segments, ahead, summed,
                          chunks, links1, GATED, STORE_FINAL, SPLIT, DEALT, Y_SCALE, HEADS, PLACES)),
            (_load_role, (x_desc, B_desc, C_desc, xs, Bs, quarters, came, summed_up, begun, read, full, walked,
                          b, first, v, g, ahead, skip, summed, chunks, gap, SPLIT, DEALT)),
            (_store_role, (y_desc, x_desc, z_desc, xs, zs, full, walked, gated, b, first, v, second, chunks, GATED)),
        ],
        [4, 4, 1, 1],
        # of two heads the numbers take 72, of one head 40
        [224, 224, 24, 24] if HEADS == 1 else [208, 208, 24, 24],
    )
    # fmt: on
