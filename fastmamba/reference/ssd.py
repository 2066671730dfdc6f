"""SSD (the Mamba-2 scan) in chunks, in plain PyTorch.

Inside a chunk the recurrence unrolls into one lower-triangular matrix of weights per head,
``M[i, j] = (C_i . B_j) exp(cum_i - cum_j) dt_j`` with ``cum`` the running sum of ``dt A``, applied to x; the tokens before
the chunk reach it through the state. One chunk of one sequence is worked on at a time: its intermediates stay in cache,
and nothing but the results grows with the sequence. With the heads of a group side by side, all products with B and C
are one large matrix product per group.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._common import Scratch, cast, compute_dtype_of, needs_grad, silu

_CHUNK = 64  # tokens
_TILE = 1024  # tokens whose decays are prepared together

# Decays are kept as powers of two: on CPU exp2 takes a third of exp's time, and no longer where it underflows.
_LOG2_E = math.log2(math.e)
# 2 to less than this is zero: a step's log-decay may stop here, and the sums over a chunk stay finite and precise.
_LOG2_OF_ZERO = {torch.float32: -160.0, torch.float64: -1100.0}


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state space dual scan, in chunks of ``chunk_size`` tokens (None: 64). Differentiable.

    Args:
        x: (B, T, H, P), any strides, like B, C and z.
        dt: (B, T, H); a step is ``clamp(softplus(dt + dt_bias), dt_min, dt_max)``.
        A: (H,).
        B, C: (B, T, G, N) with G dividing H.
        D: (H,) or (H, P), or None.
        z: (B, T, H, P) gate, or None.
        dt_bias: (H,) or None.
        initial_states: (B, H, P, N) or None for zeros.

    Returns:
        y (B, T, H, P), contiguous, in x.dtype, and the final states (B, H, P, N) in float32 (float64 for float64 inputs).
        Arithmetic is in the dtype of the states, except that with bfloat16 inputs the operands of the matrix products
        are bfloat16 where the machine has instructions for it; decays and states stay float32.
    """
    dtype = compute_dtype_of(x)
    recording = needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_states)
    scratch = Scratch(dtype, x.device, recording)
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    chunk_size = chunk_size or _CHUNK
    A, D, dt_bias = (None if p is None else p.to(dtype) for p in (A, D, dt_bias))
    if D is not None and D.dim() == 1:
        D = D[:, None]

    y = None if recording else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final_states = None if recording else torch.empty(batch, heads, head_dim, state_dim, dtype=dtype, device=x.device)
    outputs, states = [], []
    with torch.autocast(x.device.type, enabled=False):
        causal = torch.full((chunk_size, chunk_size), -torch.inf, dtype=dtype, device=x.device).triu_(1)
        for row in range(batch):
            memory = None if final_states is None else final_states[row]  # where the state lives, updated in place
            state = None if initial_states is None else initial_states[row].to(dtype)
            for start, count, size in _tiles(length, chunk_size):
                stop = start + count * size
                steps = dt[row, start:stop].unflatten(0, (count, size))
                decays = _decays(steps, A, dt_bias, dt_softplus, dt_min, dt_max, x.dtype == torch.float32)
                for index in range(count):
                    now = slice(start + index * size, start + (index + 1) * size)
                    out, state = _chunk(
                        x[row, now],
                        B[row, now],
                        C[row, now],
                        D,
                        None if z is None else z[row, now],
                        _Decays(*(None if t is None else t[index] for t in decays)),
                        state,
                        causal[:size, :size],
                        scratch,
                        None if y is None else y[row, now],
                        memory,
                    )
                    outputs.append(out)
            states.append(state)
        if y is None:
            y = torch.cat(outputs).view(x.shape)
            final_states = torch.stack(states)
    return y, final_states


def _tiles(length: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into (start, chunks, chunk size): tiles of whole chunks, then the tail as one short chunk."""
    chunks = length // chunk_size
    per_tile = max(1, _TILE // chunk_size)
    tiles = [(first * chunk_size, min(per_tile, chunks - first), chunk_size) for first in range(0, chunks, per_tile)]
    if length % chunk_size:
        tiles.append((chunks * chunk_size, 1, length % chunk_size))
    return tiles


class _Decays(NamedTuple):
    """What a chunk needs of dt and A (K chunks at once, then one of them, without the first axis)."""

    cum: torch.Tensor  # [K, H, Q] running sum of log2 of the decay, rounded
    gain: torch.Tensor  # [K, H, 1, Q] dt: what a token adds within the chunk
    fix: torch.Tensor | None  # [K, Q, H, 1] 2^(what rounding cum lost); gain holds its inverse
    from_state: torch.Tensor  # [K, Q, H, 1] decay since the chunk began
    to_state: torch.Tensor  # [K, Q, H, 1] dt times the decay until the chunk ends
    total: torch.Tensor  # [K, H, 1, 1] decay over the chunk


def _decays(
    dt: torch.Tensor,
    A: torch.Tensor,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    exact: bool,
) -> _Decays:
    """Steps and decays of the chunks ``dt`` (K, Q, H).

    The running sums reach -100 where differences of 1e-3 matter, so they are taken in float64. For float32 results what
    their rounding loses (a relative 1e-5 of the weights, a hundred times the recurrence's error) is put back by ``fix``.
    """
    dtype = A.dtype
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.clamp(dt_min, dt_max)
    wide = torch.float32 if dt.device.type == "mps" else torch.float64
    steps = (delta.to(wide) * A.to(wide) * _LOG2_E).clamp(min=_LOG2_OF_ZERO[dtype])
    cum = steps.cumsum(1)
    rounded = cum.to(dtype)
    last = cum[:, -1:]
    gain, fix = delta, None
    if exact:
        lost = (cum - rounded).to(dtype)
        gain, fix = gain * torch.exp2(-lost), torch.exp2(lost)[..., None]
    return _Decays(
        cum=rounded.mT.contiguous(),
        gain=gain.mT.contiguous()[:, :, None],
        fix=fix,
        from_state=torch.exp2(rounded)[..., None],
        to_state=(torch.exp2((last - cum).to(dtype)) * delta)[..., None],
        total=torch.exp2(last.to(dtype)).mT[..., None],
    )


def _chunk(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    decays: _Decays,
    state: torch.Tensor | None,
    causal: torch.Tensor,
    scratch: Scratch,
    out: torch.Tensor | None,
    new_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk of one sequence: x (Q, H, P), B and C (Q, G, N), state (H, P, N) or None for zeros.

    ``out`` and ``new_state`` receive the results (they may be None); ``new_state`` may be ``state`` itself.
    """
    dtype = scratch.dtype
    size, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    wide = (size, heads, head_dim)
    square = (heads, size, size)
    operand = _operand_dtype(x)
    x_ = cast(x, operand, scratch("x", wide, operand))

    # Weights M within the chunk, [H, Q, Q]; masked before exp2, which could overflow above the diagonal.
    b, c = B.to(dtype).transpose(0, 1), C.to(dtype).transpose(0, 1)  # [G, Q, N]
    scores = _matmul(c, b.mT, scratch("scores", (groups, size, size)))
    weights = torch.sub(decays.cum[:, :, None], decays.cum[:, None], out=scratch("weights", square))
    weights = torch.add(weights, causal, out=scratch("weights", square))
    weights = torch.exp2(weights, out=scratch("weights", square))
    by_group = (groups, heads // groups, size, size)
    weights = torch.mul(weights.view(by_group), scores[:, None], out=scratch("weights", by_group)).view(square)
    weights = torch.mul(weights, decays.gain, out=scratch("weights", square))
    weights = cast(weights, operand, scratch("operand", square, operand))
    y = _matmul(weights, x_.transpose(0, 1), scratch("within", (heads, size, head_dim), operand)).transpose(0, 1)

    # What the state brings in, [Q, H, P]
    target = out if out is not None and out.dtype == dtype else scratch("y", wide)
    if state is not None:
        held = cast(state, operand, scratch("state", tuple(state.shape), operand)).reshape(groups, -1, state_dim)
        c = C.to(operand).transpose(0, 1)
        before = _matmul(c, held.mT, scratch("before", (groups, size, held.shape[1]), operand))
        before = before.view(groups, size, -1, head_dim).transpose(0, 1).reshape(wide)
        if operand == dtype:
            y = torch.addcmul(y, before, decays.from_state, out=target)
        else:
            y = torch.add(torch.mul(before, decays.from_state, out=target), y, out=target)
    else:
        y = cast(y, dtype, target)
    if decays.fix is not None:
        y = torch.mul(y, decays.fix, out=target)
    if D is not None:
        y = torch.addcmul(y, x.to(dtype), D, out=target)
    if z is not None:
        y = torch.mul(y, silu(z, dtype, scratch("gate", wide)), out=target)
    if out is None:
        y = y.to(x.dtype)
    elif y is not out:
        out.copy_(y)

    # What the chunk leaves in the state
    left = torch.mul(x_, decays.to_state, out=scratch("left", wide))
    left = cast(left, operand, scratch("left operand", wide, operand)).view(size, groups, -1).permute(1, 2, 0)
    return y, _accumulate(state, decays.total, left, B.to(operand).transpose(0, 1), new_state, scratch)


def _accumulate(
    state: torch.Tensor | None,
    decay: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor | None,
    scratch: Scratch,
) -> torch.Tensor:
    """``decay * state + left @ right``, [H, P, N]; left is [G, H/G*P, Q] and right [G, Q, N]."""
    dtype, shape = decay.dtype, (left.shape[0], left.shape[1], right.shape[2])
    heads = decay.shape[0]
    target = None if out is None else out.view(shape)
    if state is None and left.dtype == dtype:
        return _matmul(left, right, target).view(heads, -1, shape[2])
    if left.dtype == dtype:
        kept = torch.mul(state, decay, out=out).view(shape)
        return torch.baddbmm(kept, left, right, out=target).view(heads, -1, shape[2])
    added = _matmul(left, right, scratch("added", shape, left.dtype)).view(heads, -1, shape[2])
    if state is None:
        return cast(added, dtype, out)
    return torch.add(torch.mul(state, decay, out=out), added, out=out)


def _operand_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the large matrix products' operands (float16 products are slow on CPU, and their range is small)."""
    if x.dtype == torch.bfloat16 and (x.device.type != "cpu" or _cpu_multiplies_bfloat16()):
        return torch.bfloat16
    return compute_dtype_of(x)


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 dot products (AVX512-BF16 or AMX); emulating them costs more than float32 does."""
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Batched product; a batch of one takes mm, which is much faster than bmm in bfloat16."""
    if a.shape[0] > 1:
        return torch.bmm(a, b, out=out)
    if out is None:
        return torch.mm(a[0], b[0])[None]
    torch.mm(a[0], b[0], out=out[0])
    return out
