"""Matrix products that also run in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. `PRECISION` says how float32 operands are multiplied (`tl.dot`'s input_precision)."""
    if _INTERPRETED:  # it holds bfloat16 as integers, would multiply those, and knows no other precision
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product
