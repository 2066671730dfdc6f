"""Ask whether patched answers are the original's.

    python -m evals.quality                                   # two small models that ship with the project; no network
    python -m evals.quality --model ibm-granite/granite-4.0-h-micro --tasks lambada_openai,piqa --dtype bf16

Exit status 1 when parity is broken; evals/quality/rules.py says when that is.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import inspect
import itertools
import json
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastmamba
from evals import environment
from evals.quality import report as reporting
from evals.quality import rules
from evals.quality.compare import compare
from evals.quality.drift import BLOCKS, STEPS, Reference

MODELS = Path(__file__).parents[1] / "models"
SMALL = ("mamba2", "granite")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        variants = _variants(options)
        models = [_folder(name) for name in options.model]
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if all(Path(name).is_dir() for name in models):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from transformers import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*already-initialized model.*")
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 200)
    device = torch.device(options.device)
    where = environment.record(device)
    where["command"] = shlex.join(
        ["python", "-m", "evals.quality", *(sys.argv[1:] if arguments is None else arguments)]
    )
    where["versions"]["lm_eval"] = environment.version("lm_eval")
    result: dict[str, Any] = {"environment": where, "rule": rules.__doc__, "models": []}
    for name in models:
        result["models"].append(_evaluate(name, variants, options, device, console))
    result["broken"] = [line for model in result["models"] for line in model.pop("broken lines")]
    reporting.show(result, console)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "quality.json").write_text(json.dumps(result, indent=1) + "\n")
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
    names = _names
    add = parser.add_argument
    add("--model", nargs="+", default=list(SMALL), help=f"hub names, folders, or {', '.join(SMALL)} (the default)")
    add("--tasks", type=names, help="lm-eval tasks; default: the local ones, recall for the small models alone; none")  # fmt: skip # noqa: E501
    add("--dtype", type=names, default=["bfloat16" if gpu else "float32"], help="float32, bfloat16, float16; several by commas")  # fmt: skip # noqa: E501
    add("--precision", type=names, default=["exact"], help="of patch(): exact, relaxed, or both")
    add("--state-dtype", type=names, default=["none"], help="of patch(): none (float32), float32, or model for the model's own")  # fmt: skip # noqa: E501
    add("--scope", type=names, default=[], help="of patch(); several by commas")
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


def _folder(name: str) -> str:
    return str(MODELS / name) if name in SMALL else name


def _variants(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """(dtype, options of patch) of every run.

    Raises:
        ValueError: an option of the command line that cannot be.
    """
    for name in options.dtype:
        if name not in DTYPES:
            raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {name!r}")
    if options.tokens and options.tokens < BLOCKS * STEPS:
        raise ValueError(f"--tokens must be 0 or at least {BLOCKS * STEPS}, got {options.tokens}")
    allowed = inspect.signature(fastmamba.patch).parameters
    found = []
    for dtype, precision, state, scope in itertools.product(
        options.dtype, options.precision, options.state_dtype, options.scope or [None]
    ):
        patch: dict[str, Any] = {"backend": options.backend}
        if scope is not None:
            patch["scope"] = scope
        if precision != "exact":
            patch["precision"] = precision
        if state not in ("none", "model", *DTYPES):
            raise ValueError(f"--state-dtype must be of none, model, {', '.join(DTYPES)}, got {state!r}")
        if state != "none":
            patch["state_dtype"] = DTYPES[dtype if state == "model" else state]
        missing = [name for name in patch if name not in allowed]
        if missing:
            raise ValueError(f"this version of fastmamba.patch has no option {', '.join(missing)}")
        found.append((dtype, patch))
    return found


def _label(dtype: str, patch: dict[str, Any]) -> str:
    extra = [str(v).removeprefix("torch.") for k, v in patch.items() if k != "backend" or v != "auto"]
    return " ".join(["patched", dtype, *extra])


def _evaluate(
    name: str,
    variants: list[tuple[str, dict[str, Any]]],
    options: argparse.Namespace,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Everything about one model."""
    from transformers import AutoTokenizer

    from evals.quality.harness import LOCAL, Harness

    began = time.perf_counter()
    small = name in map(_folder, SMALL)
    tasks = options.tasks or [f"fastmamba_{task}" for task in (LOCAL if small else LOCAL[:2])]
    max_length = options.max_length or (32768 if small else None)
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    found: dict[str, Any] = {
        "name": Path(name).name if small else name,
        "tokens": options.tokens,
        "text": [],
        "tasks": [],
    }
    found["lm_eval"] = None if tasks == ["none"] else importlib.metadata.version("lm_eval")
    broken: list[str] = []

    reference = None
    if options.tokens:
        with console.status(f"{found['name']}: original, float32"):
            model = _load(name, "float32", device)
            reference = Reference(model, _text(options, tokenizer).to(device), options.original_tokens)
            del model
    settings: dict[str, Any] = dict(
        batch_size=options.batch_size, max_length=max_length, chat_template=options.apply_chat_template
    )
    halves: dict[tuple[str, str], dict[str, Any]] = {}
    harness = None
    for dtype in options.dtype:
        model = _load(name, dtype, device)
        if reference is not None:
            yard = "bfloat16" if dtype == "float32" else dtype
            with console.status(f"{found['name']}: original, {yard}"):
                ways = ("one call",) if dtype == "float32" else ("one call", "pieces")
                original = _load(name, yard, device) if yard != dtype else model
                for way, drift in reference.drift(original, ways, original=True):
                    halves[dtype, way] = drift.summary(reference.tokens)
                    entry = {"run": f"original {yard}", "way": way, "bound": None, **halves[dtype, way]}
                    if entry["run"] not in {e["run"] for e in found["text"] if e["way"] == way}:
                        found["text"].append(entry)
                del original
        before = None
        if tasks != ["none"]:
            harness = harness or Harness(tasks, seed=options.seed, limit=options.limit, num_fewshot=options.num_fewshot)
            console.print(f"{found['name']}: lm-eval, original {dtype}", highlight=False)
            before = harness.run(model, tokenizer, **settings)
        for _, patch in (variant for variant in variants if variant[0] == dtype):
            label = _label(dtype, patch)
            with fastmamba.patched(model, **patch) as patched:
                bound = rules.USUAL[dtype]
                if reference is not None:
                    with console.status(f"{found['name']}: {label}"):
                        for way, drift in reference.drift(model):
                            half = halves.get((dtype, way), halves[dtype, "one call"])
                            summary = drift.summary(reference.tokens)
                            lines = rules.broken_drift(f"{found['name']}, {label}, {way}", summary, half, dtype)
                            broken += lines
                            bound = rules.kl_bound(half["kl"], dtype)
                            found["text"].append(
                                {"run": label, "way": way, "bound": bound, "broken": bool(lines), **summary}
                            )
                    bound = rules.kl_bound(halves[dtype, "one call"]["kl"], dtype)
                if harness is not None and before is not None:
                    console.print(f"{found['name']}: lm-eval, {label}", highlight=False)
                    after = harness.run(model, tokenizer, **settings)
                    for task in before:
                        for comparison in compare(task, before[task], after[task]):
                            lines = rules.broken_task(f"{found['name']}, {label}", comparison, bound)
                            broken += lines
                            found["tasks"].append({"run": label, "broken": bool(lines), **comparison.to_dict()})
                found["layers"] = str(patched)
        del model
        gc.collect()
    found["seconds"] = round(time.perf_counter() - began, 1)
    found["broken lines"] = broken
    return found


def _load(name: str, dtype: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype]).to(device).eval()


def _text(options: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """Token ids (1, T) of the running text, repeated where it is too short."""
    if options.text is not None:
        text = options.text.read_text(encoding="utf-8")
    else:
        text = "\n\n".join(json.loads((MODELS.parent / "lm_tasks/held_out.json").read_text(encoding="utf-8")).values())
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    return ids.repeat(1, -(-options.tokens // ids.shape[1]))[:, : options.tokens]


if __name__ == "__main__":
    sys.exit(main())
