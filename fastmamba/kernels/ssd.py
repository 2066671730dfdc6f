"""The SSD prefill: which kernel serves a call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmamba.configs import ssd_config
from fastmamba.kernels import ssd_portable
from fastmamba.kernels.token_major import token_major


def ssd(
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
    chunk_size: int | None,
    state_dtype: torch.dtype,
    relaxed: bool,
    log_A: bool,
    y_scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch the fused SSD; arguments as `fastmamba.ops.ssd`, already checked.

    With `log_A`, A holds log(-A), as models store it. y is multiplied by `y_scale` before it is rounded.

    Returns:
        y, and the final states or an empty tensor.
    """
    batch, tokens, heads, head_dim = x.shape
    groups, width = B.shape[2:]
    if x.dtype != torch.float32:
        # What F.conv1d leaves is channel-major. A copy is dear, but dearer are a copy and the slower kernel.
        x, B, C = token_major(x), token_major(B), token_major(C)
    config = ssd_config(
        x.device,
        x.dtype,
        batch,
        tokens,
        heads,
        head_dim,
        width,
        chunk_size,
        groups=groups,
        # the Hopper variant takes the logarithm of dt, which dt_min keeps from being negative
        regular=dt_min >= 0 and _regular(x, B, C) and (z is None or _regular(z)),
    )
    launch = ssd_portable.ssd
    if config.variant == "hopper":
        from fastmamba.kernels import ssd_hopper  # not every Triton has what it needs

        launch = ssd_hopper.ssd
    rest = (z, dt_bias, initial_states, dt_softplus, dt_min, dt_max, return_final_states, state_dtype, relaxed, log_A)
    return launch(config, x, dt, A, B, C, D, *rest, y_scale)


def _regular(*activations: Tensor) -> bool:
    """Whether Hopper's copy engine can read (B, T, H, P): heads side by side, all else in multiples of 16 bytes."""
    for tensor in activations:
        stride_b, stride_t, stride_h, stride_c = tensor.stride()
        if stride_c != 1 or stride_h != tensor.shape[3] or (stride_b | stride_t) & 7 or tensor.data_ptr() & 15:
            return False
    return True
