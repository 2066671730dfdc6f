"""Powers of two: the hardware's, or one accurate to a rounding of float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp2(high, low, ACCURATE: tl.constexpr):
    """2 ** (high + low) in float32; `low` is small, and looked at only if ACCURATE.

    The hardware's instruction errs up to two units in the last place. ACCURATE takes it for whole exponents only, where
    it is exact, and the Taylor series of exp for the rest: its ninth term is below 2**-27.
    """
    if ACCURATE:
        whole = tl.floor(high + 0.5)
        v = ((high - whole) + low) * 0.6931471805599453
        series = 1.0 / 40320
        series = series * v + 1.0 / 5040
        series = series * v + 1.0 / 720
        series = series * v + 1.0 / 120
        series = series * v + 1.0 / 24
        series = series * v + 1.0 / 6
        series = series * v + 0.5
        series = series * v + 1.0
        power = tl.exp2(whole) * (series * v + 1.0)
    else:
        power = tl.exp2(high)
    return power
