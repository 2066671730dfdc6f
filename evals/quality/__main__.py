"""Ask whether patched answers are the original's.

    python -m evals.quality                                   # two small models that ship with the project; no network
    python -m evals.quality --model ibm-granite/granite-4.0-h-micro --tasks lambada_openai,piqa --dtype bf16

Exit status 1 when parity is broken; evals/quality/rules.py says when that is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from evals import environment
from evals.quality import report as reporting
from evals.quality import rules
from evals.quality.drift import BLOCKS, STEPS
from evals.quality.evaluate import DTYPES, SMALL, Evaluation, Variant

STATES = ("float32", "model")
PRECISIONS, SCOPES = ("exact", "relaxed"), ("block", "mixer", "ssd")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        variants = _variants(options)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if all(name in SMALL or Path(name).is_dir() for name in options.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from transformers import logging

    logging.set_verbosity_error()
    for name in ("lm_eval", "lm_eval.api.task", "datasets"):
        getLogger(name).setLevel(ERROR)
    warnings.filterwarnings("ignore", message=".*already-initialized model.*")
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 200)
    device = torch.device(options.device)
    # The yardstick is float32. By default cuDNN convolves float32 in TF32.
    torch.backends.cudnn.allow_tf32 = False
    where = environment.record(device)
    where["command"] = shlex.join(
        ["python", "-m", "evals.quality", *(sys.argv[1:] if arguments is None else arguments)]
    )
    where["versions"]["lm_eval"] = environment.version("lm_eval")
    result: dict[str, Any] = {"environment": where, "rule": rules.__doc__, "models": [], "broken": []}
    try:
        evaluations = [Evaluation(name, options, device, console) for name in options.model]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        result["broken"] = [line for evaluation in evaluations for line in evaluation.broken]
        (options.output / "quality.json").write_text(json.dumps(reporting.finite(result), indent=1) + "\n")

    for evaluation in evaluations:
        result["models"].append(evaluation.found)
        evaluation.run(variants, save)
    reporting.show(result, console)
    reporting.plot(result, options.output / "quality.png")
    console.print(f"Written: {options.output / 'quality.json'}, {options.output / 'quality.png'}", highlight=False)
    return 1 if result["broken"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.quality",
        description=__doc__.split("\n\n")[0],
        epilog=rules.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    names, one_of = _names, _names_of
    add = parser.add_argument
    add("--model", nargs="+", default=list(SMALL), help=f"hub names, folders, or {', '.join(SMALL)} (the default)")
    add("--tasks", type=names, help="lm-eval tasks; default: the local ones, recall for the small models alone; none")  # fmt: skip # noqa: E501
    add("--dtype", type=one_of(*DTYPES), default=["bfloat16" if gpu else "float32"], help="float32, bfloat16, float16; several by commas")  # fmt: skip # noqa: E501
    add("--precision", type=one_of(*PRECISIONS), default=["exact"], help="of patch(): exact, relaxed, or both")
    add("--state-dtype", type=one_of(*STATES), default=["float32"], help="of patch(): float32, model for the model's own, or both")  # fmt: skip # noqa: E501
    add("--scope", type=one_of(*SCOPES), default=["block"], help="of patch(); several by commas")
    add("--backend", default="auto", choices=("auto", "triton", "torch"))
    add("--tokens", type=int, default=32768 if gpu else 4096, help="of running text; 0 for none (default: %(default)s)")
    add("--original-tokens", type=int, default=8192, help="longest call that the original gets of the running text; longer ones go in pieces (default: %(default)s)")  # fmt: skip # noqa: E501
    add("--text", type=Path, help="a file of running text; default: the held-out text of the small models")
    add("--limit", type=int, help="documents per task")
    add("--num-fewshot", type=int)
    add("--batch-size", default="8", help="lm-eval's; auto works too (default: %(default)s)")
    add("--max-length", type=int, help="lm-eval's longest prompt; default: 32768 for the small models")
    add("--apply-chat-template", action="store_true")
    add("--device", default="cuda" if gpu else "cpu")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("results/quality"))
    return parser


def _names(text: str) -> list[str]:
    return [SHORT.get(name.strip(), name.strip()) for name in text.split(",") if name.strip()]


def _names_of(*allowed: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        for name in _names(text):
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {name!r}")
        return _names(text)

    return parse


def _variants(options: argparse.Namespace) -> list[Variant]:
    """(dtype, options of patch) of every run.

    Raises:
        ValueError: an option of the command line that cannot be.
    """
    if options.tokens and options.tokens < BLOCKS * STEPS:
        raise ValueError(f"--tokens must be 0 or at least {BLOCKS * STEPS}, got {options.tokens}")
    if not options.tokens and options.tasks == ["none"]:
        raise ValueError("--tokens 0 with --tasks none leaves nothing to measure")
    found = []
    for dtype, precision, state, scope in itertools.product(
        options.dtype, options.precision, options.state_dtype, options.scope
    ):
        patch: dict[str, Any] = {"scope": scope, "backend": options.backend, "precision": precision}
        if state == "model" and dtype != "float32":
            patch["state_dtype"] = DTYPES[dtype]
        if (dtype, patch) not in found:
            found.append((dtype, patch))
    return found


if __name__ == "__main__":
    sys.exit(main())
