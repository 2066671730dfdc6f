"""x sigmoid(x)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """x sigmoid(x) of float32: one exp2, one division."""
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))
