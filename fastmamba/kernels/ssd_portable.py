"""The SSD prefill in one Triton launch, for every GPU that Triton supports.

A block owns one (batch row, head, slice of P) over one segment of the sequence, and keeps the state in registers in
float32 while it walks the segment chunk by chunk. Where batch x heads does not fill the GPU, the sequence is split into
several segments. Then a block first sums up what its own segment adds to the state (a short pass over x and B), waits
for the state that the segment before hands over, hands its own on, and only then walks the segment for the output.

Blocks take their work from an atomic ticket, segments in order, so a block only ever waits for a block that has already
started: no start order can deadlock. Which block does a piece of work never changes what is added to what in which
order, so the bits are the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmamba.configs import SsdConfig
from fastmamba.kernels._dot import dot
from fastmamba.kernels._exp2 import exp2
from fastmamba.kernels._launch import Launcher, unit_stride
from fastmamba.kernels._softplus import softplus

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _discretize(
    dt_ptr,  # at [b, first token of the segment, h]
    step_ptr,  # at [b, h, first token of the segment]
    cum_ptr,
    low_ptr,
    stride_dt_t,
    tokens,  # left from the segment's first token on
    chunks,
    A,
    bias,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    COMPENSATED: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
):
    """Leave dt and, per chunk, the running sum of dt * A * log2(e) in scratch memory: [b, h, t], contiguous in t.

    A decay is the power of two of a difference of such sums. Where they reach hundreds, float32 alone leaves the
    difference an absolute error near 1e-5: nothing to half precision, but many roundings of float32. COMPENSATED keeps
    what rounding the sum lost beside it.
    """
    row = tl.arange(0, R)
    col = tl.arange(0, Q)
    for first in range(0, chunks, R):
        t = (first + row)[:, None] * Q + col[None, :]  # [R, Q]
        inside = t < tokens
        dt = tl.load(dt_ptr + t.to(tl.int64) * stride_dt_t, mask=inside, other=0.0).to(tl.float32)
        if SOFTPLUS and COMPENSATED:
            dt = dt.to(tl.float64) + bias
            dt = (tl.maximum(dt, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(dt)))).to(tl.float32)
        elif SOFTPLUS:
            dt = softplus(dt + bias)
        else:
            dt += bias
        if CLAMP:
            dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
        dt = tl.where(inside, dt, 0.0)  # past the end: no decay, no input
        own = (first + row)[:, None] < chunks
        tl.store(step_ptr + t, dt, mask=own)
        if COMPENSATED:
            exact = tl.cumsum(dt.to(tl.float64) * (tl.cast(A, tl.float64) * LOG2E), axis=1)
            cum = exact.to(tl.float32)
            tl.store(low_ptr + t, (exact - cum.to(tl.float64)).to(tl.float32), mask=own)
        else:
            cum = tl.cumsum(dt * (A * LOG2E), axis=1)
        tl.store(cum_ptr + t, cum, mask=own)
    tl.debug_barrier()  # the block's other threads read it back


@triton.jit
def _rows(ptr, stride, row, has_row, col, has_col):
    """A tile of a token-major tensor: [rows, columns], zero where masked."""
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=has_row[:, None] & has_col[None, :], other=0.0)


@triton.jit
def _absorb(state, x, Bc, cum, low, step, last, last_low, PRECISION: tl.constexpr, ACCURATE: tl.constexpr):
    """The state after a chunk, [P, N], from the state before it and the chunk's x [Q, P] and B [Q, N]."""
    weight = step * exp2(last - cum, last_low - low, ACCURATE)
    xw = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
    return state * exp2(last, last_low, ACCURATE) + dot(tl.trans(xw), Bc, PRECISION)


@triton.jit
def _ssd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    init_ptr,
    y_ptr,
    final_ptr,
    handed_ptr,
    step_ptr,
    cum_ptr,
    low_ptr,
    sync_ptr,
    T,
    H,
    G,
    segments,
    chunks_per_segment,
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
    BP: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    COMPENSATED: tl.constexpr,
    D_PER_HEAD: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    GATED: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    SPLIT: tl.constexpr,
    RELAXED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG_A: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    slices: tl.constexpr = (P + BP - 1) // BP

    # -- which work: slices of P fastest, then heads (they share B and C in the cache), then segments, then the batch
    if SPLIT:
        ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    else:
        ticket = tl.program_id(0)
    part = ticket % slices
    rest = ticket // slices
    h = rest % H
    rest = rest // H
    seg = rest % segments
    b = (rest // segments).to(tl.int64)
    g = h // (H // G)

    first = seg.to(tl.int64) * (chunks_per_segment * Q)  # the segment's first token
    chunks_total = (T + Q - 1) // Q
    chunks = tl.minimum(chunks_per_segment, chunks_total - seg * chunks_per_segment)
    tokens = (T - first).to(tl.int32)

    p = part * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    q = tl.arange(0, Q)
    has_p = p < P
    has_n = n < N

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
    scratch = ((b * H + h) * slices + part) * segments * chunks_per_segment * Q + first
    step_ptr += scratch
    cum_ptr += scratch
    if COMPENSATED:
        low_ptr += scratch
    _discretize(
        dt_ptr + b * stride_dt_b + first * stride_dt_t + h * stride_dt_h,
        step_ptr,
        cum_ptr,
        low_ptr,
        stride_dt_t,
        tokens,
        chunks,
        A,
        bias,
        dt_min,
        dt_max,
        SOFTPLUS,
        CLAMP,
        COMPENSATED,
        Q,
        R,
    )

    # int64 wherever a sequence position enters: 256K tokens pass 2**31 elements
    x_seg = x_ptr + b * stride_x_b + first * stride_x_t + h * stride_x_h
    B_seg = B_ptr + b * stride_B_b + first * stride_B_t + g * stride_B_g
    C_seg = C_ptr + b * stride_C_b + first * stride_C_t + g * stride_C_g

    state = tl.zeros((BP, BN), dtype=tl.float32)  # [P, N]
    state_at = ((b * H + h) * P).to(tl.int64) * N + p[:, None] * N + n[None, :]
    has_state = has_p[:, None] & has_n[None, :]

    # -- the state before the segment
    if SPLIT:
        row = (b * H + h) * slices + part
        flag = sync_ptr + 1 + row * segments + seg
        handed = handed_ptr + ((b * H + h) * segments + seg) * (P * N) + p[:, None] * N + n[None, :]
        own = tl.zeros((BP, BN), dtype=tl.float32)
        decay = 0.0
        if seg + 1 < segments:  # what this segment alone adds to the state
            for c in range(chunks):
                at = tl.cast(c, tl.int64) * Q
                inside = q < tokens - c * Q
                cum = tl.load(cum_ptr + at + q)
                step = tl.load(step_ptr + at + q)
                last = tl.load(cum_ptr + at + Q - 1)
                low = 0.0
                last_low = 0.0
                if COMPENSATED:
                    low = tl.load(low_ptr + at + q)
                    last_low = tl.load(low_ptr + at + Q - 1)
                x = _rows(x_seg + at * stride_x_t, stride_x_t, q, inside, p, has_p)  # [Q, P]
                Bc = _rows(B_seg + at * stride_B_t, stride_B_t, q, inside, n, has_n)  # [Q, N]
                own = _absorb(own, x, Bc, cum, low, step, last, last_low, PRECISION, COMPENSATED)
                decay += last
        if seg > 0:
            arrived = tl.atomic_add(flag - 1, 0, sem="acquire")
            while arrived == 0:
                arrived = tl.atomic_add(flag - 1, 0, sem="acquire")
            tl.debug_barrier()
            # written by another multiprocessor a moment ago: not from the L1 cache
            state = tl.load(handed - P * N, mask=has_state, other=0.0, cache_modifier=".cg").to(tl.float32)
        elif init_ptr is not None:
            state = tl.load(init_ptr + state_at, mask=has_state, other=0.0).to(tl.float32)
        if seg + 1 < segments:
            tl.store(
                handed, (own + state * exp2(decay, 0.0, COMPENSATED)).to(handed_ptr.dtype.element_ty), mask=has_state
            )
            tl.debug_barrier()  # every thread's part is written before the flag rises
            tl.atomic_xchg(flag, 1, sem="release")
    elif init_ptr is not None:
        state = tl.load(init_ptr + state_at, mask=has_state, other=0.0).to(tl.float32)

    # -- the output
    y_seg = y_ptr + ((b * T + first) * H + h) * P
    if D_PER_CHANNEL:
        D = tl.load(D_ptr + h * P + p, mask=has_p, other=0.0).to(tl.float32)[None, :]
    elif D_PER_HEAD:
        D = tl.load(D_ptr + h).to(tl.float32)
    for c in range(chunks):
        at = tl.cast(c, tl.int64) * Q
        cum = tl.load(cum_ptr + at + q)
        step = tl.load(step_ptr + at + q)
        last = tl.load(cum_ptr + at + Q - 1)
        low = 0.0
        last_low = 0.0
        low_since = 0.0
        if COMPENSATED:
            low = tl.load(low_ptr + at + q)
            last_low = tl.load(low_ptr + at + Q - 1)
            low_since = low[:, None] - low[None, :]
        inside = q < tokens - c * Q
        x = _rows(x_seg + at * stride_x_t, stride_x_t, q, inside, p, has_p)  # [Q, P]
        Bc = _rows(B_seg + at * stride_B_t, stride_B_t, q, inside, n, has_n)  # [Q, N]
        Cc = _rows(C_seg + at * stride_C_t, stride_C_t, q, inside, n, has_n)  # [Q, N]

        decayed = exp2(cum[:, None] - cum[None, :], low_since, COMPENSATED) * step[None, :]  # from s to t
        decayed = tl.where(q[:, None] >= q[None, :], decayed, 0.0)
        since = exp2(cum, low, COMPENSATED)[:, None]
        before = tl.trans(state.to(dtype))
        if COMPENSATED and BN > 128:
            # Tensor cores cut off what each partial sum gains below its last bit: shorter sums lose less of float32.
            front = tl.where((n < BN // 2)[None, :], Cc, 0.0)
            back = tl.where((n >= BN // 2)[None, :], Cc, 0.0)
            scores = dot(front, tl.trans(Bc), PRECISION) * decayed + dot(back, tl.trans(Bc), PRECISION) * decayed
            y = dot(front, before, PRECISION) * since + dot(back, before, PRECISION) * since
        else:
            scores = dot(Cc, tl.trans(Bc), PRECISION)  # [Q, Q]
            if RELAXED:
                scores = scores.to(dtype).to(tl.float32)
                decayed = decayed.to(dtype).to(tl.float32)
            scores *= decayed
            y = dot(Cc, before, PRECISION) * since  # [Q, P], what came before the chunk
        y += dot(scores.to(dtype), x, PRECISION)
        state = _absorb(state, x, Bc, cum, low, step, last, last_low, PRECISION, COMPENSATED)

        if D_PER_HEAD or D_PER_CHANNEL:
            y += x.to(tl.float32) * D
        if GATED:
            z_at = z_ptr + b * stride_z_b + (first + at) * stride_z_t + h * stride_z_h
            z = _rows(z_at, stride_z_t, q, inside, p, has_p).to(tl.float32)
            y *= z * tl.sigmoid(z)
        y_at = y_seg + at * (H * P) + q[:, None] * (H * P) + p[None, :]
        tl.store(y_at, y.to(dtype), mask=inside[:, None] & has_p[None, :])

    if STORE_FINAL:
        if seg + 1 == segments:
            tl.store(final_ptr + state_at, state, mask=has_state)


_launch = Launcher(_ssd_kernel)


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
) -> tuple[Tensor, Tensor]:
    """Launch the portable kernel as `config` says; arguments as `fastmamba.kernels.ssd.ssd`."""
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2], B.shape[3]
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)

    chunk = config.chunk
    chunks = -(-tokens // chunk)
    per_segment = -(-chunks // config.segments)
    segments = -(-chunks // per_segment)
    slices = -(-head_dim // config.block_p)
    blocks = batch * heads * slices * segments

    new = x.new_empty
    y = new((batch, tokens, heads, head_dim))
    final = new((batch, heads, head_dim, width) if return_final_states else (0,), dtype=torch.float32)
    handed = new(batch * heads * segments * head_dim * width if segments > 1 else 0, dtype=state_dtype)
    compensated = x.dtype == torch.float32
    scratch = new((3 if compensated else 2, blocks * per_segment * chunk), dtype=torch.float32)
    sync = torch.zeros(1 + blocks, dtype=torch.int32, device=x.device) if segments > 1 else None
    tensors = (
        x,
        dt,
        A.contiguous(),
        B,
        C,
        None if D is None else D.contiguous(),
        z,
        None if dt_bias is None else dt_bias.contiguous(),
        None if initial_states is None else initial_states.contiguous(),
        y,
        final,
        handed,
        scratch[0],
        scratch[1],
        scratch[2] if compensated else None,
        sync,
    )
    numbers = (
        tokens,
        heads,
        groups,
        segments,
        per_segment,
        dt_min,
        dt_max,
        *x.stride()[:3],
        *dt.stride(),
        *B.stride()[:3],
        *C.stride()[:3],
        *(z.stride()[:3] if z is not None else (0, 0, 0)),
    )
    constants = (
        head_dim,
        width,
        chunk,
        config.block_p,
        config.block_n,
        config.rows,
        dt_softplus,
        dt_min > 0.0 or dt_max != float("inf") or not dt_softplus,
        compensated,
        D is not None and D.ndim == 1,
        D is not None and D.ndim == 2,
        z is not None,
        return_final_states,
        segments > 1,
        relaxed,
        config.precision,
        log_A,
    )
    _launch((blocks, 1, 1), tensors, numbers, constants, num_warps=config.warps, num_stages=config.stages)
    return y, final
