"""Compile some of what mamba_ssm's autotuners will try in a model, into Triton's cache, for `prefill_speed.py`.

    for i in 0 1 2 3; do python evals/prefill_compile.py mamba2-2.7b 4 $i & done; wait

Each of several processes takes its share of the candidates. Nothing is timed here: the choice is left to the run that
measures, which otherwise compiles them one after the other, half a minute for each new kind of model.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import shapes  # noqa: E402
from evals.ssd_compile import once  # noqa: E402
from evals.ssd_contenders import autotuners, five_kernels  # noqa: E402


def main() -> None:
    name, workers, mine = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    transformers.logging.set_verbosity_error()
    five_kernels()
    for tuner in autotuners():
        tuner.configs = tuner.configs[mine::workers] or tuner.configs[:1]
        tuner.cache_results = False
        tuner.do_bench = once
    device = torch.device("cuda", torch.cuda.current_device())
    model = shapes.build(name, 1, torch.bfloat16, device, 0)
    for tokens in (1024, 16384):  # a chunk count that 16 divides is another specialisation
        with contextlib.suppress(Exception), torch.no_grad():  # a candidate may not fit the chip
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device=device), use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
