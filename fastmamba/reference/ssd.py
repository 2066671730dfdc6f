"""SSD (the Mamba-2 scan) in chunks, in plain PyTorch.

Inside a chunk the recurrence unrolls into one lower-triangular matrix of weights per head,
``M[i, j] = (C_i . B_j) exp(cum_i - cum_j) dt_j`` with ``cum`` the running sum of ``dt A``, applied to x; the tokens
before the chunk reach it through the state. A few chunks of one sequence (a tile) are worked on at a time: nothing but
the results grows with the sequence. With the heads of a group side by side, a product with B or C is one large matrix
product per chunk and group.

Axes beside the usual ones: K chunks of a tile, R = H/G heads of a group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._common import Scratch, cast, compute_dtype_of, needs_grad, silu

_CHUNK = 64  # tokens
_TILE = 1 << 20  # elements of x worked on at a time, 192 to 640 tokens of the usual models
_PIECES = 8  # that a lone group is cut into, at most

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
    y_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan, in chunks of ``chunk_size`` tokens (None: 64). Differentiable.

    Args:
        x: (B, T, H, P), any strides, like B, C and z.
        dt: (B, T, H); a step is ``clamp(softplus(dt + dt_bias), dt_min, dt_max)``.
        A: (H,).
        B, C: (B, T, G, N) with G dividing H.
        D: (H,) or (H, P), or None.
        z: (B, T, H, P) gate, or None.
        dt_bias: (H,) or None.
        initial_states: (B, H, P, N) or None for zeros.
        y_scale: multiplies y before it is rounded.

    Returns:
        y (B, T, H, P), contiguous, in x.dtype, and the final states (B, H, P, N) in float32, which is also the dtype of
        the arithmetic (float64 for float64 inputs).
    """
    dtype = compute_dtype_of(x)
    recording = needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_states)
    scratch = Scratch(dtype, x.device, recording)
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    chunk_size = min(chunk_size or _CHUNK, length)
    # A lone group counts as several with the same B and C: each core then keeps to its own heads' states.
    if groups == 1:
        groups = next(pieces for pieces in range(min(heads, _PIECES), 0, -1) if heads % pieces == 0)
    # [G, R], and D [G, 1, R, P or 1]
    A = A.to(dtype).unflatten(0, (groups, -1))
    if dt_bias is not None:
        dt_bias = dt_bias.to(dtype).unflatten(0, (groups, -1))
    if D is not None:
        D = D.to(dtype).reshape(groups, 1, heads // groups, -1)

    y = None if recording else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outputs, states = [], []
    with torch.autocast(x.device.type, enabled=False):
        causal = torch.full((chunk_size, chunk_size), -torch.inf, dtype=dtype, device=x.device).triu_(1)
        if initial_states is None:
            final_states = torch.zeros(batch, heads, head_dim, state_dim, dtype=dtype, device=x.device)
        else:  # updated in place, hence a copy, except under autograd
            final_states = initial_states.to(dtype, memory_format=torch.contiguous_format, copy=True)
        for row in range(batch):
            state = final_states[row]
            for start, count, size in _tiles(length, chunk_size, heads * max(head_dim, chunk_size)):
                x_, dt_ = (_by_chunk(tensor[row], start, count, size, groups) for tensor in (x, dt))
                z_, y_ = (
                    None if tensor is None else _by_chunk(tensor[row], start, count, size, groups) for tensor in (z, y)
                )
                b, c = (_by_chunk(tensor[row], start, count, size, tensor.shape[2]) for tensor in (B, C))
                decays = _decays(dt_, A, dt_bias, dt_softplus, dt_min, dt_max)
                out, state = _tile(
                    x_, b.squeeze(3), c.squeeze(3), D, z_, decays, state, causal[:size, :size], y_scale, scratch, y_
                )
                outputs.append(out)
            states.append(state)
        if y is None:
            y = torch.cat([out.reshape(-1, heads, head_dim) for out in outputs]).view(x.shape).to(x.dtype)
            final_states = torch.stack(states)
    return y, final_states


def _tiles(length: int, chunk_size: int, width: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into (start, chunks, chunk size): tiles of whole chunks, then the tail as one short chunk.

    ``width`` is the elements that a token takes in the largest intermediate.
    """
    chunks = length // chunk_size
    per_tile = max(1, _TILE // (chunk_size * width))
    tiles = [(first * chunk_size, min(per_tile, chunks - first), chunk_size) for first in range(0, chunks, per_tile)]
    if length % chunk_size:
        tiles.append((chunks * chunk_size, 1, length % chunk_size))
    return tiles


def _wide_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64, wherever the tensor's device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _by_chunk(tensor: torch.Tensor, start: int, count: int, size: int, groups: int) -> torch.Tensor:
    """A view of ``count`` chunks of one sequence's (T, H or G, ...), as [K, G, Q, R or 1, ...]."""
    tile = tensor[start : start + count * size].unflatten(0, (count, size))
    return tile.unflatten(2, (groups, -1)).transpose(1, 2)


class _Decays(NamedTuple):
    """What a tile needs of dt and A."""

    cum: torch.Tensor  # [K, G, R, Q] log2 of the decay since the chunk began, rounded
    gain: torch.Tensor  # [K, G, Q, R, 1] dt, over fix: what a token adds within the chunk
    fix: torch.Tensor | None  # [K, G, Q, R, 1] 2 to what rounding cum lost
    from_state: torch.Tensor  # [K, G, Q, R, 1] decay since the chunk began
    to_state: torch.Tensor  # [K, G, Q, R, 1] dt times the decay until the chunk ends
    total: torch.Tensor  # [K, H, 1, 1] decay over the chunk


def _decays(
    dt: torch.Tensor,
    A: torch.Tensor,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> _Decays:
    """Steps and decays of a tile from its dt [K, G, Q, R], with A and dt_bias [G, R].

    The running sums reach -100 where differences of 1e-3 matter, so they are taken in float64. What rounding them to
    float32 loses (1e-5 of a weight, a hundred times the recurrence's error) is put back through ``fix``.
    """
    dtype = A.dtype
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias[:, None]
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.clamp(dt_min, dt_max)
    wide = _wide_dtype(dt)
    steps = (delta.to(wide) * A.to(wide)[:, None] * _LOG2_E).clamp(min=_LOG2_OF_ZERO[dtype])
    cum = steps.cumsum(2)
    rounded = cum.to(dtype)
    last = cum[:, :, -1:]
    gain, fix = delta[..., None], None
    if dtype != wide:
        lost = (cum - rounded).to(dtype)[..., None]
        gain, fix = gain * torch.exp2(-lost), torch.exp2(lost)
    return _Decays(
        cum=rounded.mT.contiguous(),
        gain=gain,
        fix=fix,
        from_state=torch.exp2(rounded)[..., None],
        to_state=(torch.exp2((last - cum).to(dtype)) * delta)[..., None],
        total=torch.exp2(last.to(dtype)).view(dt.shape[0], -1, 1, 1),
    )


def _tile(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    decays: _Decays,
    state: torch.Tensor,
    causal: torch.Tensor,
    y_scale: float,
    scratch: Scratch,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks of one tile: x and z [K, G, Q, R, P], B and C [K, G or 1, Q, N], state [H, P, N] before it.

    Returns ``out`` filled, or y [K, Q, G, R, P] uncast if it is None, and the state after the tile, which is ``state``
    itself, updated in place, unless autograd records.
    """
    dtype = scratch.dtype
    chunks, groups, size, per_group, head_dim = wide = tuple(x.shape)
    square = (chunks, groups, per_group, size, size)
    by_head = (chunks, groups, per_group, size, head_dim)
    x = cast(x, dtype, scratch("x", wide))
    b, c = (tensor.to(dtype).expand(-1, groups, -1, -1) for tensor in (B, C))

    # Where decay is strong, y is little else than C.B x: in float32 one long sum errs twice as much as the recurrence.
    wider = _wide_dtype(x)
    scores = (C.to(wider) @ B.to(wider).mT).to(dtype)
    # Weights within the chunks; masked before exp2, which could overflow above the diagonal.
    weights = torch.sub(decays.cum[..., :, None], decays.cum[..., None, :], out=scratch("first", square))
    weights = torch.add(weights, causal, out=scratch("first", square))
    weights = torch.exp2(weights, out=scratch("first", square))
    weights = torch.mul(weights, scores[:, :, None], out=scratch("first", square)).reshape(-1, size, size)
    spare = scratch("second", wide) if out is None or out.dtype != dtype else out.transpose(1, 2)
    added = None if spare is None else spare.view(by_head)
    added = torch.mul(x.transpose(2, 3), decays.gain.transpose(2, 3), out=added).reshape(-1, size, head_dim)
    y = torch.bmm(weights, added, out=scratch("third", tuple(added.shape))).view(by_head).transpose(2, 3)

    # What the state brings into each chunk, [K, G, Q, R*P], and what the chunk leaves in the state.
    left = torch.mul(x, decays.to_state, out=None if spare is None else spare.view(wide)).flatten(3)
    carried = scratch("first", tuple(left.shape))
    brought = []
    for index in range(chunks):
        before = state.view(groups, -1, state.shape[2]).mT
        brought.append(torch.bmm(c[index], before, out=None if carried is None else carried[index]))
        state = torch.mul(state, decays.total[index], out=None if carried is None else state)
        by_group = state.view(groups, -1, state.shape[2])
        by_group = torch.baddbmm(by_group, left[index].mT, b[index], out=None if carried is None else by_group)
        state = by_group.view(state.shape)
    carried = (torch.stack(brought) if carried is None else carried).view(wide)

    target = out if out is not None and out.dtype == dtype else scratch("second", wide)
    y = torch.addcmul(y, carried, decays.from_state, out=target)
    if decays.fix is not None:
        y = torch.mul(y, decays.fix, out=target)
    if D is not None:
        y = torch.addcmul(y, x, D, out=target)
    if z is not None:
        y = torch.mul(y, silu(z, dtype, scratch("gate", wide)), out=target)
    if y_scale != 1.0:
        y = torch.mul(y, y_scale, out=target)
    if out is None:
        return y.transpose(1, 2), state
    return out if y is out else out.copy_(y), state
