"""The SSD recurrence token by token, as it is defined: slow, and what the chunked version is checked against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._common import compute_dtype_of


def ssd_recurrence(
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
    compute_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T``, ``y_t = (h_t C_t + D x_t) silu(z_t)``, one token after the other.

    Shapes and results are those of :func:`fastmamba.reference.ssd.ssd`. Everything, the state included, is held in
    ``compute_dtype``: by default float32 (float64 for float64 inputs); a half precision here shows what error the dtype
    itself accounts for.
    """
    states_dtype = compute_dtype_of(x)
    dtype = compute_dtype or states_dtype
    batch, length, heads, head_dim = x.shape
    heads_per_group = heads // B.shape[2]

    def to(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype)

    delta = to(dt) if dt_bias is None else to(dt) + to(dt_bias)
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.clamp(dt_min, dt_max)
    decay = torch.exp(delta * to(A))
    x_, b_, c_ = to(x), to(B).repeat_interleave(heads_per_group, dim=2), to(C).repeat_interleave(heads_per_group, dim=2)
    if initial_states is None:
        state = torch.zeros(batch, heads, head_dim, B.shape[3], dtype=dtype, device=x.device)
    else:
        state = to(initial_states)

    outputs = []
    for t in range(length):
        # [B, H, P, N]
        update = (delta[:, t, :, None] * x_[:, t])[..., None] * b_[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + update
        outputs.append((state * c_[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + (to(D) if D.dim() == 2 else to(D)[:, None]) * x_
    if z is not None:
        y = y * F.silu(to(z))
    return y.to(x.dtype), state.to(states_dtype)
