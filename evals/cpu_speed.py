"""CPU speed and memory on the Mamba2-130M shape: transformers as it is, with chunk 64 set by hand, and patched.

    python evals/cpu_speed.py
    python evals/cpu_speed.py --other-python .venv/transformers-5.17.0/bin/python

`mixer.chunk_size = 64` is the cheapest thing a user can do without fastmamba, so it stands beside every figure. Each
measurement has a process of its own; within it the variants take turns. `--other-python` adds the prefill of another
transformers version, from an interpreter that has it (`make .venv/transformers-VERSION/stamp` makes one).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment, memory, shapes, timing  # noqa: E402

VARIANTS = ("original", "chunk 64", "patched")
CPU = torch.device("cpu")
SHAPE = "mamba2-130m"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", default="1024,4096", help="lengths, comma separated (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other-python", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--output", type=Path, default=Path("results/cpu_speed.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(json.loads(options.worker))))
        return 0

    common: dict[str, Any] = {"layers": options.layers, "repeats": options.repeats, "seed": options.seed}
    record: dict[str, Any] = {
        "environment": environment.record(CPU),
        "shape": SHAPE,
        **common,
        "rows": [],
        "others": [],
    }
    print(environment.one_line(record["environment"]))
    print(f"{SHAPE} shape, {options.layers} layers, batch 1, medians of {options.repeats}")
    header = "{:<24}{:>8}" + "{:>13}" * len(VARIANTS) + "{:>11}{:>13}"
    print(header.format("", "tokens", *VARIANTS, "original/", "chunk 64/"))
    print(header.format("", "", *[""] * len(VARIANTS), "patched", "patched"))
    lengths = [int(text) for text in options.tokens.split(",")]
    failed = False
    for what, dtype in (("scan", "float32"), ("prefill", "float32"), ("prefill", "bfloat16")):
        for tokens in lengths:
            job: dict[str, Any] = common | {"what": what, "dtype": dtype, "tokens": tokens, "variants": VARIANTS}
            row: dict[str, Any] = job | ask(Path(sys.executable), job)
            row["peak_extra_bytes"] = {
                variant: ask(Path(sys.executable), job | {"variants": [variant], "peak": True})["peak_extra_bytes"]
                for variant in VARIANTS
            }
            record["rows"].append(row)
            failed = failed or not row["agrees"]
            medians = [row[variant]["median_ms"] for variant in VARIANTS]
            print(
                header.format(f"{what} {dtype}, ms", f"{tokens:,}", *[f"{ms:,.1f}" for ms in medians], *ratios(medians))
            )
            if None not in (peaks := [row["peak_extra_bytes"][variant] for variant in VARIANTS]):
                mib = [peak / 2**20 for peak in peaks]
                print(header.format("  peak extra MiB", "", *[f"{size:,.0f}" for size in mib], *ratios(mib)))
            print(f"  difference from the original {row['difference']:.1e}, limit {row['limit']:.0e}")

    first = next(row for row in record["rows"] if (row["what"], row["dtype"]) == ("prefill", "float32"))
    for python in options.other_python:
        other: dict[str, Any] = first | ask(python, first | {"variants": ["original"], "repeats": 3})
        ms = other["original"]["median_ms"]
        record["others"].append({key: other[key] for key in ("what", "dtype", "tokens", "transformers", "original")})
        print(
            f"transformers {other['transformers']}, prefill float32, {first['tokens']:,} tokens: {ms:,.0f} ms, "
            f"{ms / first['patched']['median_ms']:.1f}x patched"
        )

    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {options.output}")
    if failed:
        print("FAILED: patched and original differ by more than the limit")
    return 1 if failed else 0


def ratios(values: list[float]) -> list[str]:
    original, rival, patched = values
    return [f"{original / patched:.1f}x", f"{rival / patched:.1f}x"]


def ask(python: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process of its own, under `python`."""
    command = [str(python), str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise SystemExit(f"{python} failed on {job} (exit code {finished.returncode})")
    return json.loads(finished.stdout.splitlines()[-1])


# ---- inside a process ---------------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Timings of each variant and how far patched is from the original; or, asked for the peak, its memory alone."""
    import transformers

    transformers.logging.set_verbosity_error()
    memory.limit()
    torch.manual_seed(job["seed"])
    prepare = prepare_scan if job["what"] == "scan" else prepare_prefill
    run = prepare(job)
    with torch.no_grad():
        if job.get("peak"):
            (variant,) = job["variants"]
            run(variant, 64)  # what the first call sets up once is nobody's peak
            with memory.Peak(CPU) as peak:
                run(variant, job["tokens"])
            return {"peak_extra_bytes": peak.extra}
        outputs = {variant: run(variant, job["tokens"]) for variant in job["variants"]}
        times: dict[str, list[float]] = {variant: [] for variant in job["variants"]}
        for _ in range(job["repeats"]):
            for variant in job["variants"]:
                times[variant].append(timing.timed(lambda: run(variant, job["tokens"]), CPU))  # noqa: B023
    result: dict[str, Any] = {variant: timing.summary(ms) for variant, ms in times.items()}
    result["transformers"] = transformers.__version__
    result["threads"] = torch.get_num_threads()
    if "patched" in outputs:
        original, patched = outputs["original"].double(), outputs["patched"].double()
        result["difference"] = float((patched - original).norm() / original.norm())
        result["limit"] = 1e-1 if job["dtype"] == "bfloat16" else 1e-4
        result["agrees"] = result["difference"] <= result["limit"]
    return result


def prepare_scan(job: dict[str, Any]) -> Callable[[str, int], torch.Tensor]:
    """The scan alone, on views of one projection as a mixer hands them over."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    from fastmamba import ops

    dtype, config = getattr(torch, job["dtype"]), shapes.config_for(SHAPE)
    heads, width, state = config.num_heads, config.head_dim, config.state_size
    A = -torch.empty(heads).uniform_(1, 16)
    D = torch.ones(heads)
    dt_bias = torch.empty(heads).uniform_(-6.9, -2.3)
    projection = torch.randn(1, max(job["tokens"], 64), heads * width + 2 * state + heads).to(dtype)

    def run(variant: str, tokens: int) -> torch.Tensor:
        x, B, C, dt = projection[:, :tokens].split([heads * width, state, state, heads], dim=-1)
        x, B, C = x.unflatten(-1, (heads, width)), B.unsqueeze(2), C.unsqueeze(2)
        if variant == "patched":
            y, _ = ops.ssd(
                x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True, backend="torch"
            )
            return y
        chunk = 64 if variant == "chunk 64" else config.chunk_size
        y, _ = mamba2_chunk_scan(
            x, dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True
        )
        return y

    return run


def prepare_prefill(job: dict[str, Any]) -> Callable[[str, int], torch.Tensor]:
    """Prefill of the model, the last position's logits."""
    import fastmamba

    model = shapes.build(SHAPE, job["layers"], getattr(torch, job["dtype"]), CPU, job["seed"])
    mixers: list[Any] = [module for module in model.modules() if hasattr(module, "chunk_size")]
    chunk = model.config.chunk_size
    ids = torch.randint(model.config.vocab_size, (1, max(job["tokens"], 64)))

    def run(variant: str, tokens: int) -> torch.Tensor:
        for mixer in mixers:
            mixer.chunk_size = 64 if variant == "chunk 64" else chunk
        if variant == "patched":
            fastmamba.patch(model)
        try:
            return model(input_ids=ids[:, :tokens], use_cache=True, logits_to_keep=1).logits
        finally:
            if variant == "patched":
                fastmamba.unpatch(model)

    return run


if __name__ == "__main__":
    sys.exit(main())
