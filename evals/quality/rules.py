"""When parity is broken. One page, so that it can be read and disputed.

The yardstick is the original itself: what it loses when it runs in half precision instead of float32.

1. Running text. KL(original in float32 || patched), in nats a token.
   In bfloat16 or float16, patched may be at most twice as far from the float32 original as the original in that dtype.
   In float32 nothing may be lost that rounding in float32 does not explain: float32 rounds 65,536 times finer than
   bfloat16, and KL grows with the square of an error. One hundredth of bfloat16's error is allowed, so one
   ten-thousandth of its KL.
   That holds for the mean over the text. Each sixteenth of it may have twice what that allows for the original's own
   worst sixteenth: where experts are routed, a single token sent elsewhere is most of a sixteenth's KL, and it happens
   to either model anywhere. Where the original itself is not finite, nothing is asked.
2. Tasks. The paired difference of a score may be at most two of its standard errors. Perplexities hardly differ between
   documents, so their standard errors can be smaller than any difference that matters: a relative difference below a
   tenth of sqrt(2 KL), with the KL that rule 1 allows, does not count. (sqrt(2 KL) is the size of a token's change in
   log likelihood. Without running text, KL is taken as 1e-8, 1e-5 or 1e-4 nats in float32, float16 or bfloat16.)
   Two standard errors are passed by chance in 5 of 100 comparisons whose differences are noise.
"""

from __future__ import annotations

import math
from typing import Any

from evals.quality.compare import Comparison

FACTOR = 2.0
FLOAT32_PART = 1e-4
STANDARD_ERRORS = 2.0
TINY = 1e-12
"""Of a KL: what float32 logits themselves leave undecided."""
USUAL = {"float32": 1e-8, "float16": 1e-5, "bfloat16": 1e-4}
"""Bounds that stand in for rule 2's where no running text was measured: about those of the small models."""


def kl_bound(half_kl: float, dtype: str) -> float | None:
    """The KL that a patched model may have, from the original's own in half precision (bfloat16 for dtype float32).

    None where the original's is not finite.
    """
    if not math.isfinite(half_kl):
        return None
    return max(TINY, half_kl * (FLOAT32_PART if dtype == "float32" else FACTOR))


def broken_drift(name: str, drift: dict[str, Any], half: dict[str, Any], dtype: str) -> list[str]:
    """What a drift summary breaks, in words; `half` is the original's summary in half precision."""
    found = []
    bound = kl_bound(half["kl"], dtype)
    worst = kl_bound(max([half["kl"], *(block["kl"] for block in half["by position"])]), dtype)
    if bound is None or worst is None:
        return []
    if not drift["kl"] <= bound:  # NaN breaks it too
        found.append(f"{name}: KL {drift['kl']:.3g} above {bound:.3g}")
    for block in drift["by position"]:
        if not block["kl"] <= 2 * worst:
            found.append(f"{name}, tokens {block['from']} to {block['to']}: KL {block['kl']:.3g} above {2 * worst:.3g}")
            break
    return found


def broken_task(name: str, comparison: Comparison, kl: float) -> list[str]:
    """What a comparison breaks, in words; `kl` is what `kl_bound` allows."""
    gap = abs(comparison.difference)
    if math.isnan(comparison.patched):
        return [f"{name}: {comparison.task} {comparison.metric} is not a number"]
    immaterial = 0.1 * math.sqrt(2 * kl) * abs(comparison.original)
    error = comparison.difference_stderr
    allowed = 0.0 if math.isnan(error) else STANDARD_ERRORS * error
    if gap <= max(immaterial, allowed):
        return []
    return [
        f"{name}: {comparison.task} {comparison.metric} moved by {comparison.difference:+.4g}, "
        f"more than {STANDARD_ERRORS:g} of its standard errors ({error:.3g})"
    ]
