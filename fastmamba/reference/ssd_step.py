"""One token of the SSD recurrence, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import compute_dtype_of


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

    Returns:
        y (B, H, P) in x.dtype. Arithmetic is in float32 (float64 if x or the state is).
    """
    dtype = compute_dtype_of(x, state)
    batch, heads, head_dim = x.shape
    groups, state_dim = B.shape[1:]
    delta = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    x_ = x.to(dtype)
    added = (delta[..., None] * x_).view(batch, groups, -1, 1)  # [B, G, H/G*P, 1]

    # The state as [B, G, H/G*P, N], in memory of its own unless it can be updated where it is.
    in_place = state.dtype == dtype and state.is_contiguous()
    held = (state if in_place else state.to(dtype, copy=True)).view(batch, heads, head_dim, state_dim)
    held.mul_(torch.exp(delta * A.to(dtype))[..., None, None])
    held = held.view(batch, groups, -1, state_dim)
    held.addcmul_(added, B.to(dtype)[:, :, None])
    if not in_place:
        state.copy_(held.view(state.shape))

    y = (held @ C.to(dtype)[..., None]).view(batch, heads, head_dim)
    if D is not None:
        y = y + (D.to(dtype) if D.dim() == 2 else D.to(dtype)[:, None]) * x_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)
