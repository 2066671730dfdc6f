"""Time prefill of Mamba-2 models at growing context, as loaded and after `fastmamba.patch(model)`.

    python examples/prefill_timing.py
    python examples/prefill_timing.py --model ibm-granite/granite-4.0-h-micro --tokens 1K,16K,128K --dtype bfloat16

Each length is measured original and patched in turn in one process, and the outputs are compared. Prints a table,
writes a plot (PNG) and everything measured (JSON). Exits 0 when every patched run finished and every comparison held,
1 when not, 2 on a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals/ lies beside examples/, wherever this is started

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from evals import environment, prefill, prefill_report, shapes  # noqa: E402

# What a bare run measures: small models that two CPU cores finish in minutes, the real sizes on a GPU.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": dict(
        model=["mamba2-130m", "granite-4.0-h-350m"],
        layers=4,
        tokens="256,512,1K,2K,4K",
        dtype="float32",
        repeats=3,
    ),
    "cuda": dict(
        model=["mamba2-2.7b", "granite-4.0-h-micro"],
        layers=None,
        tokens="1K,2K,4K,8K,16K,32K,64K,128K,256K",
        dtype="bfloat16",
        repeats=5,
    ),
}
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    settings = prefill.Settings(
        device=options.device,
        dtype=options.dtype,
        layers=options.layers,
        batch=options.batch,
        repeats=options.repeats,
        seed=options.seed,
        scope=options.scope,
        backend=options.backend,
        original=options.original,
        time_limit=options.time_limit,
    )
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 180)
    where = environment.record(torch.device(options.device))
    record: dict[str, Any] = {
        "environment": where,
        "settings": vars(settings) | {"tokens": options.tokens},
        "models": [],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    console.print(environment.one_line(where))

    faults: list[str] = []
    runs = (1 + options.original) * (prefill.UNTIMED_RUNS + options.repeats)  # of one model at one length
    rows = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=runs * len(options.model) * len(options.tokens))
        for name in options.model:
            model: dict[str, Any] = {"name": label(name, options.layers), "rows": []}
            record["models"].append(model)

            def show(side: str, name: str = name) -> None:
                progress.update(task, description=f"{name} {side}", advance=int(side != "check"))

            try:
                for row in prefill.measure(name, options.tokens, settings, ready=model.update, phase=show):
                    model["rows"].append(row)
                    rows += 1
                    progress.update(task, completed=runs * rows)  # those that a failure left out included
                    write(record, options.output)  # a run that is cut short leaves what it has measured
                    progress.console.print(prefill_report.line(model["name"], row))
                    faults += judge(model["name"], row)
            except RuntimeError as error:
                faults.append(str(error))
                progress.console.print(str(error), style="red")

    record["passed"] = not faults
    written = [write(record, options.output)]
    if done := [model for model in record["models"] if model["rows"]]:
        console.print(f"prefill, {options.dtype}, batch {options.batch}, median (range) of {options.repeats} runs")
        console.print(prefill_report.table(done, plain=not console.is_terminal))
        written.append(options.output / "prefill_timing.png")
        prefill_report.plot(done, environment.one_line(where), written[-1])
    for path in written:
        console.print(f"wrote {path}")
    for fault in faults:
        console.print(f"FAILED: {fault}")
    return 1 if faults else 0


def judge(name: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: patched has to finish, and to agree. An original that fails is a result."""
    place = f"{name} at {row['tokens']:,} tokens"
    if row["patched"]["status"] != "ok":
        return [f"{place}: patched {row['patched']['status']}: {row['patched']['message']}"]
    if row["patched"]["original_calls"]:
        return [f"{place}: patched layers ran the original forward: {row['patched']['original_calls']}"]
    if row["check"] and not row["check"]["passed"]:
        return [f"{place}: outputs differ: {row['check']}"]
    return []


def write(record: dict[str, Any], folder: Path) -> Path:
    path = folder / "prefill_timing.json"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(scratch, path)
    return path


def label(name: str, layers: int | None) -> str:
    short = Path(name).name if Path(name).exists() else name
    kind = " shape" if name in shapes.NAMES else ""
    return f"{short}{kind}" + (f", {layers} layers" if layers else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"a hub name, a folder, or a built-in shape with random weights ({', '.join(shapes.NAMES)}); repeatable",
    )
    parser.add_argument(
        "--layers", type=positive, help="keep this many layers (default: 4 of built-in shapes on a CPU)"
    )
    parser.add_argument("--tokens", help="context lengths, such as 1K,4K,256K")
    parser.add_argument("--dtype", choices=[*DTYPES, *DTYPES.values()])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--repeats", type=positive, help="timed runs of each side at each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to (default: results)")
    parser.add_argument("--scope", choices=["block", "mixer", "ssd"], default="block", help="what patch() replaces")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto", help="what patch() runs on")
    parser.add_argument("--no-original", dest="original", action="store_false", help="time the patched model alone")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds one run may take")
    options = parser.parse_args(argv)

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(options.device).type
    except RuntimeError:
        kind = None
    if kind not in DEFAULTS:
        parser.error(f"argument --device: expected auto, cpu, cuda or cuda:N, got {options.device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch sees no CUDA device")
    defaults = DEFAULTS[kind]
    if options.model is None:
        options.model = defaults["model"]
        options.layers = options.layers or defaults["layers"]
    try:
        options.tokens = sorted({token_count(text) for text in (options.tokens or defaults["tokens"]).split(",")})
    except ValueError as error:
        parser.error(f"argument --tokens: {error}")
    dtype = options.dtype or defaults["dtype"]
    options.dtype = DTYPES.get(dtype, dtype)
    options.repeats = options.repeats or defaults["repeats"]
    return options


def token_count(text: str) -> int:
    """4096, "4K" and "4k" are the same length."""
    digits, factor = (text.strip()[:-1], 1024) if text.strip()[-1:] in ("K", "k") else (text.strip(), 1)
    if not digits.isdigit() or int(digits) == 0:
        raise ValueError(f"expected a positive number such as 512 or 4K, got {text!r}")
    return int(digits) * factor


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
