"""Matrix products that also run in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. `PRECISION` says how float32 operands are multiplied (`tl.dot`'s input_precision)."""
    if INTERPRETED:  # it holds bfloat16 as integers, would multiply those, and knows no other precision
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def finished(product, NVIDIA: tl.constexpr):
    """`product` itself, which has to be there: for a product that a loop does nothing with but add to it.

    Triton (3.6) lets such a one run on into the loop's next turn, in pieces, and does not keep the next left operand
    from being written into registers that a piece may still have to read: wrong sums on Hopper, now and then.
    """
    if NVIDIA and not INTERPRETED:  # a use that costs nothing
        product = tl.inline_asm_elementwise("", "=r,0", [product], dtype=tl.float32, is_pure=True, pack=1)
    return product
