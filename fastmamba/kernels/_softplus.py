"""Softplus, accurate over all of float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(v):
    """log(1 + exp(v)) in float32."""
    e = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + e
    # Kahan's log1p: log(u) e / (u - 1) takes back the rounding of 1 + e; where u rounds to 1, the answer is e itself.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(v > 20.0, v, log1p)  # past 20, float32 cannot tell softplus(v) from v
