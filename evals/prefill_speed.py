"""Prefill of whole models: the original, the scan alone patched, everything patched, and what the GPU could do at best.

    python evals/prefill_speed.py --model mamba2-2.7b --tokens 1K,4K,16K,64K,128K
    python evals/prefill_speed.py --batch 8 --tokens 1K,4K,16K

Beside the times stand the speedup, the peak of memory above the weights, the floor (see `evals.prefill_floor`), and
from a profiled run what the GPU's time goes to. Outputs are compared at every length, as `evals.prefill` does.
Put mamba_ssm's Triton kernels on the path to have transformers find them: the environment line says what it found.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment, prefill, shapes  # noqa: E402
from evals.prefill_kinds import KINDS  # noqa: E402

MODELS = (
    "mamba2-130m",
    "mamba2-370m",
    "mamba2-1.3b",
    "mamba2-2.7b",
    *(name for name in shapes.NAMES if name.startswith("granite")),
)
TOKENS = "1K,4K,16K,64K,128K,256K"
LINES = {"original": "#d55e00", "ssd": "#e69f00", "patched": "#0072b2"}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    where = environment.record(torch.device(options.device))
    console.print(environment.one_line(where))
    record: dict[str, Any] = {"environment": where, "models": []}
    options.output.mkdir(parents=True, exist_ok=True)
    faults = []
    for name in options.model:
        for batch in options.batch:
            settings = settings_for(options, batch)
            model: dict[str, Any] = {"name": name, "batch": batch, "rows": []}
            record["models"].append(model)
            try:
                for row in prefill.measure(name, options.tokens, settings, ready=model.update):
                    model["rows"].append(row)
                    console.print(line(model, row))
                    faults += judge(model, row)
                    write(record, options.output)
            except RuntimeError as error:
                faults.append(f"{name}: {error}")
    write(record, options.output)
    measured = [model for model in record["models"] if model["rows"]]
    console.print(speed_table(measured))
    if any(row[side].get("gpu") for model in measured for row in model["rows"] for side in LINES if side in row):
        console.print(kinds_table(measured))
    try:
        plot(measured, environment.one_line(where), options.output / "prefill_speed.png")
    except ImportError:
        console.print("no plot: matplotlib is not installed")
    for fault in faults:
        console.print(f"FAILED: {fault}")
    return 1 if faults else 0


def settings_for(options: argparse.Namespace, batch: int) -> prefill.Settings:
    lengths = {}
    for side, where in (("ssd", options.ssd_tokens), ("original", options.original_tokens)):
        if where is not None:
            lengths[side] = frozenset(where)
    return prefill.Settings(
        device=options.device,
        dtype=options.dtype,
        layers=options.layers,
        batch=batch,
        repeats=options.repeats,
        time_limit=options.time_limit,
        sides=("patched", "ssd", "original") if options.ssd_tokens != [] else prefill.SIDES,
        lengths=lengths,
        thrifty=True,
        enough=options.enough,
        breakdown=True if options.breakdown_tokens is None else frozenset(options.breakdown_tokens),
        reference_tokens=options.reference_tokens,
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        own_process=not options.in_process,
        checks=not options.no_check,
    )


def judge(model: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: what is patched has to finish, and to agree. An original that fails is a result."""
    place = f"{model['name']}, batch {model['batch']}, {row['tokens']:,} tokens"
    faults = []
    for side in ("patched", "ssd"):
        found = row.get(side, {"status": "not run"})
        if found["status"] not in ("ok", "not run"):
            faults.append(f"{place}: {side} {found['status']}: {found['message']}")
        elif found.get("original_calls"):
            faults.append(f"{place}: {side} ran the original forward: {found['original_calls']}")
    if row["check"] and not row["check"]["passed"]:
        faults.append(f"{place}: outputs differ: {row['check']}")
    return faults


def ms_of(row: dict[str, Any], side: str) -> Any:
    return row.get(side, {}).get("median_ms")


def ratio(over: Any, under: Any) -> str:
    return f"{over / under:.2f}x" if over and under else "-"


def cell(row: dict[str, Any], side: str) -> str:
    found = row.get(side, {"status": "not run"})
    if found["status"] != "ok":
        return "-" if found["status"] == "not run" else found["status"]
    return f"{found['median_ms']:,.1f}"


def line(model: dict[str, Any], row: dict[str, Any]) -> str:
    times = ", ".join(f"{side} {cell(row, side)}" for side in LINES if side in row)
    return f"{model['name']} x{model['batch']} {row['tokens']:,}: {times} ms"


def speed_table(models: list[dict[str, Any]]) -> Table:
    result = Table(title="prefill, ms", box=box.ASCII)
    for heading in ("model", "batch", "tokens", "original", "ssd only", "patched", "ssd only faster", "patched faster"):
        result.add_column(heading, justify="right")
    headings = ("floor", "over floor", "original +MiB", "patched +MiB", "error, original", "error, patched")
    for heading in (*headings, "hidden error, original", "hidden error, patched"):
        result.add_column(heading, justify="right")
    for model in models:
        for row in model["rows"]:
            original, patched = ms_of(row, "original"), ms_of(row, "patched")
            best = (row.get("floor") or {}).get("total_ms")
            check = row["check"] or {}
            memory = [row[side].get("peak_extra_bytes") for side in ("original", "patched")]
            errors = [check.get("original_error"), check.get("patched_error", check.get("difference"))]
            errors += [check.get(f"{side}_hidden_error") for side in ("original", "patched")]
            result.add_row(
                model["name"],
                str(model["batch"]),
                f"{row['tokens']:,}",
                *(cell(row, side) for side in LINES),
                ratio(original, ms_of(row, "ssd")),
                ratio(original, patched),
                f"{best:,.1f}" if best else "-",
                ratio(patched, best),
                *(f"{value / 2**20:,.0f}" if value is not None else "-" for value in memory),
                *(f"{value:.1e}" if value is not None else "-" for value in errors),
            )
        result.add_section()
    return result


def kinds_table(models: list[dict[str, Any]]) -> Table:
    result = Table(title="GPU time by kind, ms", box=box.ASCII)
    for heading in ("model", "batch", "tokens", "side", "wall", "GPU busy", "launches", *(kind for kind, _ in KINDS)):
        result.add_column(heading, justify="right")
    for model in models:
        for row in model["rows"]:
            for side in LINES:
                gpu = row.get(side, {}).get("gpu")
                if gpu is None:
                    continue
                kinds = [f"{gpu['kinds'].get(kind, 0.0):,.1f}" for kind, _ in KINDS]
                times = (cell(row, side), f"{gpu['busy_ms']:,.1f}", str(gpu["launches"]))
                result.add_row(model["name"], str(model["batch"]), f"{row['tokens']:,}", side, *times, *kinds)
    return result


def plot(models: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Time, and times the floor, against context on a logarithmic axis; one column a model and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from evals.prefill_report import short_count

    if not models:
        return
    figure, axes = plt.subplots(2, len(models), figsize=(4.6 * len(models), 7), squeeze=False, sharex="col")
    for (times, factors), model in zip(axes.T, models, strict=True):
        rows = model["rows"]
        for side, colour in LINES.items():
            done = [row for row in rows if ms_of(row, side)]
            times.plot([r["tokens"] for r in done], [ms_of(r, side) for r in done], "o-", color=colour, label=side)
            gained = [(r["tokens"], r["original"]["median_ms"] / ms_of(r, side)) for r in done if ms_of(r, "original")]
            factors.plot([tokens for tokens, _ in gained], [gain for _, gain in gained], "o-", color=colour)
            for place in gained if side == "patched" else ():
                factors.annotate(f"{place[1]:.1f}", place, (0, 6), textcoords="offset points", ha="center")
        best = [row for row in rows if row.get("floor")]
        floors = [row["floor"]["total_ms"] for row in best]
        times.plot([row["tokens"] for row in best], floors, "--", color="0.5", label="floor")
        times.set(title=f"{model['name']}, batch {model['batch']}", xscale="log", yscale="log")
        factors.set(xlabel="context, tokens", xscale="log", ylim=(0, None))
        ticks = [row["tokens"] for row in rows]
        factors.set_xticks(ticks, [short_count(tokens) for tokens in ticks])
        factors.minorticks_off()
        times.legend()
        for axis in (times, factors):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("prefill, ms")
    axes[1, 0].set_ylabel("times faster than the original")
    figure.text(0.01, 0.005, caption, fontsize=6.5, wrap=True)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(record: dict[str, Any], folder: Path) -> None:
    (folder / "prefill_speed.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", metavar="NAME", help=f"repeatable (default: {', '.join(MODELS)})")
    parser.add_argument("--tokens", type=lengths, default=lengths(TOKENS), help=f"default: {TOKENS}")
    parser.add_argument("--ssd-tokens", type=lengths, help="lengths of the side with the scan alone patched ('': none)")
    parser.add_argument("--original-tokens", type=lengths, help="lengths of the original (default: all)")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-tokens", type=int, default=4096, help="compare with float32 up to this length")
    parser.add_argument("--prefill-chunk-tokens", type=int, help="patch(prefill_chunk_tokens=...)")
    parser.add_argument("--breakdown-tokens", type=lengths, help="lengths that are profiled (default: all; '': none)")
    parser.add_argument("--no-check", action="store_true", help="run nothing for the sake of a comparison alone")
    parser.add_argument("--in-process", action="store_true", help="no process of its own for each model")
    parser.add_argument("--enough", type=float, default=math.inf, metavar="S", help="repeat no row that took S seconds")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds one row may take")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args(argv)
    options.model = options.model or list(MODELS)
    return options


def lengths(text: str) -> list[int]:
    """4096, "4K" and "4k" are the same length."""
    found = []
    for part in filter(None, text.split(",")):
        digits, factor = (part[:-1], 1024) if part[-1] in "kK" else (part, 1)
        if not digits.isdigit() or int(digits) == 0:
            raise argparse.ArgumentTypeError(f"expected a positive number such as 512 or 4K, got {part!r}")
        found.append(int(digits) * factor)
    return found


if __name__ == "__main__":
    sys.exit(main())
