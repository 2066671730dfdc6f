"""Compile some of what the peers' autotuners will try, into Triton's cache; `ssd_speed.py --workers` runs several.

An autotuner compiles its candidates one after the other, half a minute for each new width of head and state. Nothing is
timed here, so the choice is left to the run that measures.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals.ssd_contenders import autotuners, peers  # noqa: E402
from evals.ssd_grid import Shape  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    dtype, workers, mine, sizes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    found = peers()
    for tuner in autotuners():  # leave each one every `workers`-th candidate, and let it run each once
        tuner.configs = tuner.configs[mine::workers] or tuner.configs[:1]
        tuner.cache_results = False
        tuner.do_bench = once
    device = torch.device("cuda", torch.cuda.current_device())
    for heads, head_dim, groups, state in sizes:
        for tokens in (1024, 16384):  # a chunk count that 16 divides is another specialisation
            case = Shape("", 1, tokens, heads, head_dim, groups, state).case(DTYPES[dtype], device)
            for peer in found:
                with contextlib.suppress(Exception), torch.no_grad():  # a candidate may not fit the chip
                    peer.call(case)
    torch.cuda.synchronize()


def once(call, quantiles):
    """What an autotuner takes for a benchmark."""
    call()
    return [1.0] * len(quantiles)


if __name__ == "__main__":
    main()
