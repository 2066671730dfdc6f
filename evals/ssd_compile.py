"""Compile our kernels and what the peers' autotuners will try into Triton's cache; run by `ssd_speed.py --workers`.

An autotuner compiles its candidates one after the other, half a minute for each new width of head and state. Nothing is
timed here, so the choice is left to the run that measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals.ssd_contenders import autotuners, peers  # noqa: E402
from evals.ssd_grid import Shape  # noqa: E402
from fastmamba import configs  # noqa: E402
from fastmamba.ops import ssd  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    dtype, workers, mine = DTYPES[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])
    shapes = [Shape(**shape) for shape in json.loads(sys.argv[4])]
    device = torch.device("cuda", torch.cuda.current_device())
    ours(shapes, dtype, device, workers, mine)
    found = peers()
    for tuner in autotuners():  # leave each one every `workers`-th candidate, and let it run each once
        tuner.configs = tuner.configs[mine::workers] or tuner.configs[:1]
        tuner.cache_results = False
        tuner.do_bench = once
    for heads, head_dim, groups, state in sorted({(s.heads, s.head_dim, s.groups, s.state) for s in shapes}):
        for tokens in (1024, 16384):  # a chunk count that 16 divides is another specialisation
            case = Shape("", 1, tokens, heads, head_dim, groups, state).case(dtype, device)
            for peer in found:
                with contextlib.suppress(Exception), torch.no_grad():  # a candidate may not fit the chip
                    peer.call(case)
    torch.cuda.synchronize()


def ours(shapes: list[Shape], dtype: torch.dtype, device: torch.device, workers: int, mine: int) -> None:
    """Run each variant on its share of the shapes, on fewer tokens: in the configuration of all of them."""
    pairs = [(shape, variant) for variant in configs.ssd_variants(device) for shape in shapes]
    for shape, variant in pairs[mine::workers]:
        size = (shape.batch, shape.tokens, shape.heads, shape.head_dim, shape.state, None)
        short = dataclasses.replace(shape, tokens=min(shape.tokens, 16384))
        with contextlib.suppress(ValueError):  # the variant does not cover the shape
            with configs.override(variant):
                config = configs.ssd_config(device, dtype, *size, groups=shape.groups)
            case = short.case(dtype, device)
            with configs.override(config):
                run: Any = ssd
                run(*case.arguments(), **case.keywords(), backend="triton")
                torch.cuda.synchronize()


def once(call, quantiles):
    """What an autotuner takes for a benchmark."""
    call()
    return [1.0] * len(quantiles)


if __name__ == "__main__":
    main()
