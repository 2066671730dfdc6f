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


@triton.jit
def softplus_by_series(v):
    """log(1 + exp(v)) in float32, in a third of the instructions: where many are worked out.

    To 2e-7 of it for |v| < 1, 5e-7 for |v| < 10; then as exp(v) errs by the rounding of v * log2(e), 4e-6 at v = -80.
    """
    e = tl.exp2(tl.abs(v) * -1.4426950408889634)
    series = 0.005232665687799454
    series = series * e - 0.02950511872768402
    series = series * e + 0.0782257467508316
    series = series * e - 0.1366322636604309
    series = series * e + 0.19105996191501617
    series = series * e - 0.2484297901391983
    series = series * e + 0.3331909775733948
    series = series * e - 0.4999949336051941
    series = series * e + 0.9999999403953552
    return tl.maximum(v, 0.0) + series * e
