"""One token of the SSD recurrence, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import compute_dtype_of

_BLOCK = 1 << 20  # elements of the state read out at a time, through as much memory


def ssd_step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``state = exp(dt A) state + dt x B^T`` in place; ``y = (state C + D x) silu(z)``. dt is never clamped.

    Args:
        state: (B, H, P, N), updated in place.
        x: (B, H, P).
        dt: (B, H).
        A: (H,).
        B, C: (B, G, N) with G dividing H.
        D: (H,) or (H, P), or None.
        z: (B, H, P) or None.
        dt_bias: (H,) or None.
        out_dtype: of y; None is x.dtype.

    Returns:
        y (B, H, P). Arithmetic is in float32 (float64 if x or the state is).
    """
    dtype = compute_dtype_of(x, state)
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    x_ = x.to(dtype)
    added = (delta[..., None] * x_).view(batch, groups, -1, 1)  # [B, G, H/G*P, 1]

    # Memory of its own unless the state can be updated where it is.
    in_place = state.dtype == dtype and state.is_contiguous()
    held = state if in_place else state.to(dtype, memory_format=torch.contiguous_format, copy=True)
    held.mul_(torch.exp(delta * A.to(dtype))[..., None, None])
    by_group = held.view(batch, groups, -1, state_dim)  # [B, G, H/G*P, N]
    by_group.addcmul_(added, B.to(dtype)[:, :, None])
    if not in_place:
        state.copy_(held)

    # Products first, then their sum, which is pairwise: one long sum, as in a matrix product, errs twice as much.
    c = C.to(dtype)[:, :, None]
    step = max(1, _BLOCK // max(1, by_group[0].numel()))
    sums = [(by_group[row : row + step] * c[row : row + step]).sum(-1) for row in range(0, batch, step)]
    y = torch.cat(sums).view(batch, heads, head_dim)
    if D is not None:
        y = y + (D.to(dtype) if D.dim() == 2 else D.to(dtype)[:, None]) * x_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype or x.dtype)
