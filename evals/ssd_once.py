"""Run the SSD a few times and nothing else: the program that profilers and sanitizers are pointed at.

    python evals/ssd_once.py --tokens 131072
    python evals/ssd_once.py --small-grid

The last call lies between cudaProfilerStart and Stop. The small grid has what makes memory accesses odd: tails, heads
that fill no block, groups, gates, initial states, wide heads and states, batches, and two long sequences; its outputs
are checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import racecheck_ptx  # noqa: E402
from evals.ssd_check import allowed, errors  # noqa: E402
from fastmamba import configs  # noqa: E402
from fastmamba.ops import ssd  # noqa: E402
from fastmamba.testing import SsdCase, ssd_case  # noqa: E402

# B, T, H, P, G, N
SMALL_GRID: list[tuple[tuple[int, int, int, int, int, int], dict[str, Any]]] = [
    ((1, 1, 1, 64, 1, 128), {}),
    ((1, 130, 3, 64, 1, 128), {"initial": True}),
    ((2, 577, 8, 64, 2, 128), {"gate": True}),
    ((2, 200, 4, 64, 2, 128), {"gate": True}),  # z whose tokens do not begin at multiples of 16 bytes
    ((1, 1100, 8, 64, 1, 128), {"dtype": torch.float16, "initial": True, "gate": True, "per_channel_d": True}),
    ((1, 200, 2, 128, 1, 64), {}),
    ((1, 129, 2, 128, 2, 256), {"skip": False}),
    ((1, 1100, 2, 64, 1, 256), {"initial": True}),
    ((3, 64, 2, 40, 1, 48), {"bias": False, "initial": True}),
    # Long enough to leave out what has decayed, and for blocks to be dealt out by head; the second one in few blocks.
    ((1, 8200, 3, 128, 1, 256), {}),
    ((1, 43600, 2, 128, 1, 128), {"initial": True, "segments": 2}),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, value in (("batch", 1), ("tokens", 1024), ("heads", 80), ("head-dim", 64), ("groups", 1), ("state", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--variant", help="of the kernel; without it, whichever serves the shape")
    parser.add_argument("--small-grid", action="store_true", help="odd small shapes instead")
    parser.add_argument("--for-racecheck", action="store_true", help="kernels in the form of racecheck_ptx.py")
    options = parser.parse_args()
    if options.for_racecheck:
        racecheck_ptx.install()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    if options.small_grid:
        return small_grid([options.variant] if options.variant else list(configs.ssd_variants(device)), device)
    size = (options.batch, options.tokens, options.heads, options.head_dim, options.groups, options.state)
    case = ssd_case(*size, dtype=getattr(torch, options.dtype), device=device)
    run(case, options.variant)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run(case, options.variant)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def run(case: SsdCase, variant: str | None, segments: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The SSD, on the Hopper variant in so many segments, if any are given."""
    call: Any = ssd
    if variant is None:
        return call(*case.arguments(), **case.keywords(), backend="triton")
    chosen: Any = variant
    if segments is not None and variant == "hopper":
        batch, tokens, heads, head_dim = case.x.shape
        shape = (batch, tokens, heads, head_dim, case.B.shape[3])
        with configs.override(variant):
            config = configs.ssd_config(case.x.device, case.x.dtype, *shape, None, groups=case.B.shape[2])
        chosen = dataclasses.replace(config, segments=segments)
    with configs.override(chosen):
        return call(*case.arguments(), **case.keywords(), backend="triton")


def small_grid(variants: list[str], device: torch.device) -> int:
    bad = 0
    for size, options in SMALL_GRID:
        settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": device} | options
        segments = settings.pop("segments", None)
        case = ssd_case(*size, **settings)
        limits = allowed(case)
        for variant in variants:
            try:
                result = run(case, variant, segments)
            except ValueError as error:  # the variant does not cover this case
                print(f"{variant}: {case}: {error}", flush=True)
                continue
            (found,) = errors(case, [result])
            right = all(error <= limit for error, limit in zip(found, limits, strict=True))
            bad += not right
            print(f"{variant}: {case}: {'ok' if right else f'WRONG, {found} where {limits} is allowed'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
