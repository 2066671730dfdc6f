"""Find fast launch configurations of the SSD on this GPU, and write them where fastmamba looks for them.

    python evals/tune.py --heads 80 --tokens 16384,131072 --seconds 60
    FASTMAMBA_TUNED=~/tables python evals/tune.py --heads 48 --batch 8 --tokens 4096 --table ~/tables

For each length it measures the heuristic's choice and what differs from it in one field, and from then on what a random
forest, trained on all that has been measured, holds for most likely to be fast. The fastest ones are measured again at
the end, in turn with the heuristic's. Every configuration is checked before it is timed, in another process: one that
does not compile, hangs, crashes or is wrong is noted and passed over. Each measurement is logged at once, and a run
that was broken off goes on where it was. fastmamba looks for tables in the folder that the environment variable
FASTMAMBA_TUNED names, then in its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

import fastmamba  # noqa: E402
from evals import environment  # noqa: E402
from evals.tune_measure import Measurer, Worker  # noqa: E402
from evals.tune_search import Config, Result, Search, Space, key  # noqa: E402
from fastmamba import configs, tuned  # noqa: E402

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", default="16384", help="lengths, comma separated (default: %(default)s)")
    for name, value in (("batch", 1), ("heads", 80), ("head-dim", 64), ("groups", 1), ("state", 128)):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--variant", help="of the kernel: only this one (default: each that the GPU has)")
    parser.add_argument("--seconds", type=float, default=120, help="for each length and variant (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=30, help="seconds one configuration may take to compile and run"
    )
    parser.add_argument("--workers", type=int, default=4, help="processes that compile (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("results/tune.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the log already has")
    parser.add_argument(
        "--table", type=Path, default=tuned.folders()[0], metavar="FOLDER", help="(default: %(default)s)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    device = torch.device("cuda", torch.cuda.current_device())
    console = Console()
    variants = [options.variant] if options.variant else list(configs.ssd_variants(device))
    report = Table(title=f"{torch.cuda.get_device_name(device)}, GPU time in us", title_justify="left")
    for column in ("tokens", "variant", "heuristic", "tuned", "measured", "configuration"):
        report.add_column(column)
    entries = []
    for tokens in (int(text) for text in options.tokens.split(",")):
        for variant in variants:
            shape = tuned.Shape(
                DTYPES[options.dtype], options.batch, tokens, options.heads, options.head_dim, options.state
            )
            try:
                start = heuristic(device, shape, options.groups, variant)
            except ValueError as error:
                console.print(f"{tokens:,} tokens: {error}")
                continue
            blocks = torch.cuda.get_device_properties(device).multi_processor_count
            best, before, count = tune(space(start, shape, blocks), shape, options, console)
            entries.append({"shape": vars(shape), "config": best.config, "us": best.us, "heuristic_us": before.us})
            changed = {name: value for name, value in best.config.items() if value != getattr(start, name)}
            shown = [f"{tokens:,}", variant, f"{before.time:,.1f}", f"{best.time:,.1f}", str(count)]
            report.add_row(*shown, ", ".join(f"{name} {value}" for name, value in changed.items()) or "the heuristic's")
    if not entries:
        return 1
    path = write_table(options.table, torch.cuda.get_device_name(device), entries, environment.record(device))
    console.print(report)
    console.print(f"table: {path}")
    return 0


def heuristic(device: torch.device, shape: tuned.Shape, groups: int, variant: str) -> configs.SsdConfig:
    """What would be chosen without a table.

    Raises:
        ValueError: the variant does not cover the shape.
    """
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim, shape.state)
    with mock.patch.object(tuned, "entries", lambda *_: ()), configs.override(variant):
        configs._choose.cache_clear()
        found = configs.ssd_config(device, getattr(torch, shape.dtype), *size, None, groups=groups)
    configs._choose.cache_clear()
    return found


# What is tried, by variant. Where a field is not named the heuristic's choice stays; its segments are always tried too.
SEGMENTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
CHOICES: dict[str, dict[str, list[Any]]] = {
    "hopper": {"segments": SEGMENTS, "stages": [2, 3, 4]},
    "portable": {
        "chunk": [32, 64, 128],
        "segments": SEGMENTS,
        "block_p": [64, 128],
        "rows": [8, 16, 32],
        "warps": [4, 8],
        "stages": [1, 2, 3, 4, 5],
        "registers": [128, 168, configs.MOST_REGISTERS],  # four, three and two blocks of four warps a multiprocessor
        "scores": [False, True],
    },
}


def space(start: configs.SsdConfig, shape: tuned.Shape, multiprocessors: int = 1) -> Space:
    """What is tried for a shape on a GPU of so many multiprocessors, beginning with the heuristic's choice."""
    choices = dict(CHOICES[start.variant])
    if start.variant == "hopper" and start.block_n > 128:
        del choices["stages"]  # that kernel has two, whatever a configuration says
    scans = shape.batch * shape.heads * -(-shape.head_dim // start.block_p)
    full = {max(1, resident * multiprocessors // scans) for resident in (1, 2, 3, 4)}  # so many fill the GPU just so
    choices["segments"] = sorted({start.segments, *choices["segments"], *full})
    if start.blocks > 1:
        choices["blocks"] = [1, start.blocks]  # equal segments, or dealt out
    if shape.dtype == "float32":
        choices.pop("scores", None)  # which it does not do
    if torch.version.hip:
        choices.pop("registers", None)  # a bound that only NVIDIA's compiler takes
    if "block_p" in choices:
        choices["block_p"] = [width for width in choices["block_p"] if width <= max(start.block_p, shape.head_dim)]

    def valid(config: Config) -> bool:
        return config["segments"] == 1 or config["segments"] * config["chunk"] * 2 <= shape.tokens

    return Space(dataclasses.asdict(start), choices, valid)


def tune(
    shape_space: Space, shape: tuned.Shape, options: argparse.Namespace, console: Console
) -> tuple[Result, Result, int]:
    """(the best, the heuristic's choice, how many were measured) for one shape."""
    sizes = vars(shape).copy()
    dtype = sizes.pop("dtype")
    first = {"shape": {"model": "", "groups": options.groups, **sizes}, "dtype": dtype, "seed": options.seed}
    command = [sys.executable, str(Path(__file__).with_name("tune_worker.py"))]
    about = {"device": torch.cuda.get_device_name(), "kernels": kernels_hash(), **first}
    about["versions"] = {name: environment.version(name) for name in ("torch", "triton")}
    workers = [Worker(command, first) for _ in range(options.workers)]
    measurer = Measurer(workers, options.log, about, options.timeout)
    search = Search(shape_space, batch=max(8, options.workers), seed=options.seed)
    earlier = [] if options.fresh else measurer.earlier()
    search.results |= {
        key(result.config): result for result in earlier if result.config.keys() == shape_space.start.keys()
    }
    try:
        measurer.start()  # which takes seconds that no measurement should pay for
        with progress(console) as bar:
            name = f"{shape.tokens:,} tokens, {shape_space.start.get('variant', '')}"
            task = bar.add_task(name, total=options.seconds, best="", count=0)
            began = time.monotonic()

            def measure(some: list[Config]) -> Iterator[Result]:
                for result in measurer(some):
                    yield result
                    best = min(search.best_time, result.time)
                    spent = min(time.monotonic() - began, options.seconds)
                    bar.update(task, completed=spent, best=f"{best:,.1f} us", count=len(search.results) + 1)
                    if spent >= options.seconds:
                        return

            search.run(measure, lambda: time.monotonic() - began < options.seconds)
            bar.update(task, completed=options.seconds)
            best, before = confirm(search, measurer.workers[0], options.timeout)
    finally:
        measurer.stop()
    return best, before, len(search.results)


def confirm(search: Search, worker: Worker, timeout: float, most: int = 3, rounds: int = 3) -> tuple[Result, Result]:
    """Measure the fastest few and the heuristic's again, in turn: the fastest of many was partly lucky."""
    ranked = sorted((result for result in search.results.values() if result.us is not None), key=lambda r: r.time)
    start = search.results.get(key(search.space.start), Result(search.space.start, None, "not measured"))
    finalists = ranked[:most] + ([start] if start.us is not None and start not in ranked[:most] else [])
    times: dict[Any, list[float]] = {key(result.config): [] for result in finalists}
    for _ in range(rounds):
        for result in finalists:
            if (us := worker.ask({"time": result.config}, timeout).get("us")) is not None:
                times[key(result.config)].append(us)
    again = [Result(r.config, sorted(t)[len(t) // 2]) for r in finalists if (t := times[key(r.config)])]
    if not again:
        raise RuntimeError("the fastest configurations do not run a second time")
    before = next((result for result in again if key(result.config) == key(start.config)), start)
    best = min(again, key=lambda result: result.time)
    # a gain that measuring again may undo is no reason to leave the heuristic
    return (before if before.time <= 1.01 * best.time else best), before


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]} measured"))
    return Progress(*columns, TextColumn("best {task.fields[best]}"), TimeRemainingColumn(), console=console)


def kernels_hash() -> str:
    """Of the sources that a measurement depends on."""
    package = Path(fastmamba.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.joinpath("kernels").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_table(folder: Path, device_name: str, entries: list[dict[str, Any]], measured: dict[str, Any]) -> Path:
    """Put entries into a device's table, in the place of earlier ones of the same shape and variant."""
    path = folder / f"{tuned.slug(device_name)}.json"
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def place(entry: dict[str, Any]) -> Any:
        return key(entry["shape"]), entry["config"]["variant"]

    about = {name: measured[name] for name in ("date", "command", "versions")}
    new = [entry | {"measured": about} for entry in entries]
    merged = {place(entry): entry for entry in [*table.get("ssd", []), *new]}
    ordered = sorted(merged.values(), key=lambda entry: (key(entry["shape"]), entry["config"]["variant"]))
    written = {"device": device_name, "ssd": ordered}
    half = path.with_suffix(".new")
    half.write_text(json.dumps(written, indent=1) + "\n")
    tuned.load(half, "ssd", configs.SsdConfig)  # what cannot be read back is not put in place
    os.replace(half, path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
