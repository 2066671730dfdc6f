"""Speed of the SSD: every variant of ours, every peer that can be imported, and what the machine can do at best.

    python evals/ssd_speed.py --quick
    python evals/ssd_speed.py --output results/ssd_speed.json
    python evals/ssd_speed.py --plot results/ssd_speed.json

GPU time is that of a CUDA graph of the call, wall time that of an eager call from an idle GPU until its last kernel is
done; both with a cold L2 cache, medians of --repeats. A result is timed only after it has been checked against float64,
over its whole length: it may err twice what the plain recurrence in its dtype errs. The floor is the larger of two: the
least traffic to memory at the speed of a device copy, and the matrix products of chunks of 64 at the speed of a large
matrix product, both measured in the same run. The speedup plot is that of "Accelerating Mamba2 with Kernel Fusion",
figures 9 and 10.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment  # noqa: E402
from evals.gpu_timing import Timer, ceilings  # noqa: E402
from evals.ssd_check import allowed, errors  # noqa: E402
from evals.ssd_contenders import Contender, config, contenders  # noqa: E402
from evals.ssd_grid import GRID, MAMBA2_2B7, QUICK, Shape  # noqa: E402
from fastmamba.testing import SsdCase  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GRIDS = {"all": GRID, "2.7b": MAMBA2_2B7, "quick": QUICK}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grid", choices=GRIDS, default="all", help="shapes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument(
        "--shapes", metavar="TEXTS", help="of these, those whose name has one of the texts in it, as 'N 256;40 x 128'"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--precision", default="exact", help="exact, relaxed or both, comma separated")
    parser.add_argument(
        "--only", help="some contenders, by name, comma separated: hopper, portable, mamba_ssm, article"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further shape after this long")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--output", type=Path, default=Path("results/ssd_speed.json"))
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the plot of an earlier run")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if options.repeats < 3:
        parser.error(f"--repeats must be at least 3, got {options.repeats}")
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    began = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = DTYPES[options.dtype]
    shapes = chosen(GRIDS["quick" if options.quick else options.grid], options.shapes)
    rivals = contenders(device, tuple(options.precision.split(",")))
    if options.only:
        names = options.only.split(",")
        if unknown := [name for name in names if name not in {rival.name for rival in rivals}]:
            raise SystemExit(f"there is no {', '.join(unknown)} here, but {', '.join(rival.name for rival in rivals)}")
        rivals = [rival for rival in rivals if rival.name in names]
    compile_beforehand(options.workers, shapes, options.dtype)
    timer = Timer(device, options.repeats)
    record: dict[str, Any] = {
        "environment": environment.record(device),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "ceilings": ceilings(timer),
        "contenders": [rival.name for rival in rivals],
        "ours": [rival.name for rival in rivals if rival.ours],
        "rows": [],
        "skipped": [],
    }
    console = Console(width=190)
    console.print(environment.one_line(record["environment"]), soft_wrap=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for shape in shapes:
        if time.monotonic() - began > options.seconds:
            record["skipped"].append(shape.label + f", {shape.tokens:,} tokens")
            continue
        row = measure_shape(shape, dtype, rivals, timer, record["ceilings"], options.seed)
        record["rows"].append(row)
        record["seconds"] = time.monotonic() - began
        options.output.write_text(json.dumps(record, indent=1))  # each time: the next shape may end the process
        console.print(progress(row), soft_wrap=True, highlight=False)
    console.print(table(record))
    for shape in record["skipped"]:
        console.print(f"not measured, out of time: {shape}")
    draw(record, options.output.with_suffix(".png"))
    wrong = [row for row in record["rows"] for name in record["ours"] if row[name]["status"] in ("wrong", "failed")]
    if wrong:
        console.print(f"{len(wrong)} of our results are wrong or failed")
    return 1 if wrong else 0


def chosen(shapes: list[Shape], texts: str | None) -> list[Shape]:
    """Those whose name has one of `texts`, separated by semicolons, in it; all of them where there is no text.

    Raises:
        SystemExit: there is none for a text.
    """
    if texts is None:
        return shapes
    wanted = [text.strip() for text in texts.split(";")]
    for text in wanted:
        if not any(text in shape.label for shape in shapes):
            names = dict.fromkeys(shape.label for shape in shapes)
            raise SystemExit(f"--shapes: no name has {text!r} in it; there are {'; '.join(names)}")
    return [shape for shape in shapes if any(text in shape.label for text in wanted)]


def measure_shape(
    shape: Shape, dtype: torch.dtype, rivals: list[Contender], timer: Timer, best: dict[str, float], seed: int
) -> dict[str, Any]:
    """Check, then time, every contender on one shape."""
    row: dict[str, Any] = {
        "shape": vars(shape),
        "label": shape.label,
        "memory_floor_ms": shape.bytes(dtype) / best["copy_bytes_per_s"] * 1e3,
        "matmul_floor_ms": shape.flops() / best["matmul_flop_per_s"] * 1e3,
    }
    case = shape.case(dtype, timer.device, seed)
    limits = allowed(case)
    row["allowed_errors"] = limits
    row |= {rival.name: {} for rival in rivals}
    takes: list[tuple[Contender, SsdCase]] = []
    results = []
    for rival in rivals:
        found = row[rival.name]
        taken, found["remark"] = rival.prepare(case)
        if taken is None:
            found["status"] = "refused"
            continue
        try:
            with rival.scope(), torch.no_grad():
                start = time.perf_counter()
                rival.call(taken)
                torch.cuda.synchronize()
                found["first_call_s"] = time.perf_counter() - start
                poison(taken)
                results.append(rival.call(taken))
                torch.cuda.synchronize()
                if rival.ours:
                    found["config"] = vars(config(taken))
        except Exception as error:  # a peer may not take this shape, and the others are still to be timed
            found |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        takes.append((rival, taken))
    for (rival, _), both in zip(takes, errors(case, results), strict=True):
        right = all(error <= limit for error, limit in zip(both, limits, strict=True))  # NaN is not
        row[rival.name] |= {"status": "ok" if right else "wrong", "errors": both}
    results.clear()
    for rival, taken in takes:
        found = row[rival.name]
        with rival.scope(), torch.no_grad():
            found["gpu"] = timer.gpu(lambda call=rival.call, taken=taken: call(taken))
            found["wall"], found["host"] = timer.eager(lambda call=rival.call, taken=taken: call(taken))
    del case, takes
    gc.collect()
    torch.cuda.empty_cache()
    return row


def poison(case: SsdCase) -> None:
    """Leave NaN where the allocator will put the next y: what is not written will show."""
    block = torch.full(case.x.shape, torch.nan, dtype=case.x.dtype, device=case.x.device)
    del block


def compile_beforehand(workers: int, shapes: list[Shape], dtype: str) -> None:
    """Fill Triton's cache with our kernels and what the peers' autotuners try, which would compile one by one."""
    if workers:
        program = [sys.executable, str(Path(__file__).with_name("ssd_compile.py")), dtype, str(workers)]
        listed = json.dumps([vars(shape) for shape in shapes])
        running = [subprocess.Popen([*program, str(i), listed], env=os.environ) for i in range(workers)]
        for process in running:
            process.wait()


def progress(row: dict[str, Any]) -> str:
    """One shape in one line, as soon as it is there."""
    parts = [
        f"{name} {cell['gpu']['median_ms']:.3f} ms, errs {cell['errors'][0]:.1e}"
        f"{'' if cell['status'] == 'ok' else ' ' + cell['status'].upper()}"
        if "gpu" in cell
        else f"{name} {cell['status']}"
        for name, cell in row.items()
        if isinstance(cell, dict) and "status" in cell
    ]
    return f"{row['label']}, {row['shape']['tokens']:,} tokens: {'; '.join(parts)}"


def table(record: dict[str, Any]) -> Table:
    """Medians, with half the distance of the quartiles, beside the floor; speedups over the first peer."""
    best = record["ceilings"]
    title = (
        f"SSD, {record['dtype']}, ms: median of {record['repeats']}, cold L2. Device copy "
        f"{best['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix products {best['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    remarks = {f"{n}: {row[n]['remark']}" for row in record["rows"] for n in record["contenders"] if row[n]["remark"]}
    caption = "\n".join(f"* {remark}" for remark in sorted(remarks))
    out = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    out.add_column("shape", no_wrap=True)
    for column in ("tokens", "floor"):
        out.add_column(column, justify="right")
    for name in record["contenders"]:
        out.add_column(f"{name} GPU", justify="right")
        out.add_column("wall", justify="right")
    peer = next((name for name in record["contenders"] if name not in record["ours"]), None)
    for name in record["ours"] if peer else ():
        out.add_column(f"{peer}/{name} GPU", justify="right")
        out.add_column("wall", justify="right")
    last = None
    for row in record["rows"]:
        floor = max(row["memory_floor_ms"], row["matmul_floor_ms"])
        cells = [row["label"] if row["label"] != last else "", f"{row['shape']['tokens']:,}", f"{floor:.3f}"]
        last = row["label"]
        for name in record["contenders"]:
            cells += [_cell(row[name], "gpu"), _cell(row[name], "wall")]
        for name in record["ours"] if peer else ():
            cells += [_ratio(row, peer, name, "gpu"), _ratio(row, peer, name, "wall")]
        out.add_row(*cells)
    return out


def _cell(found: dict[str, Any], what: str) -> str:
    if what not in found:
        return found["status"]
    median, (low, high) = found[what]["median_ms"], found[what]["quartiles_ms"]
    mark = "" if found["status"] == "ok" else " WRONG"
    return f"{median:.3f} ±{50 * (high - low) / median:.0f}%{mark}{' *' if found['remark'] else ''}"


def _ratio(row: dict[str, Any], peer: str | None, name: str, what: str) -> str:
    value = speedup(row, peer, name, what)
    return "" if value is None else f"{value:.2f}x"


def speedup(row: dict[str, Any], peer: str | None, name: str, what: str) -> float | None:
    """How many times faster, or None where either was not timed or was wrong."""
    pair = [row[side] for side in (peer, name) if side]
    if any(what not in side or side["status"] != "ok" for side in pair):
        return None
    return pair[0][what]["median_ms"] / pair[1][what]["median_ms"]


def draw(record: dict[str, Any], path: Path) -> None:
    """The speedup over tokens, a line per shape: GPU time to the left, wall time to the right."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"matplotlib is not installed: draw {path.name} elsewhere, with --plot")
        return
    peer = next((name for name in record["contenders"] if name not in record["ours"]), None)
    if peer is None:
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=False)
    styles = ["-", "--", ":", "-."]
    labels = list(dict.fromkeys(row["label"] for row in record["rows"]))
    for axis, what in zip(axes, ("gpu", "wall"), strict=True):
        for colour, label in enumerate(labels):
            for style, name in zip(styles, record["ours"], strict=False):
                points = [
                    (row["shape"]["tokens"], value)
                    for row in record["rows"]
                    if row["label"] == label and (value := speedup(row, peer, name, what)) is not None
                ]
                if points:
                    mark = "o" if len(points) > 1 else "s"
                    axis.plot(*zip(*sorted(points), strict=True), style, marker=mark, color=f"C{colour}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", ylabel=f"times faster than {peer}", ylim=(0, None))
        axis.set_xscale("log", base=2)
        ticks = sorted({row["shape"]["tokens"] for row in record["rows"]})
        axis.set_xticks(ticks, [f"{tick // 1024}K" for tick in ticks])
        axis.set_title({"gpu": "GPU time (CUDA graph)", "wall": "wall time of an eager call"}[what])
    for colour, label in enumerate(labels):
        axes[0].plot([], [], color=f"C{colour}", label=label)
    for style, name in zip(styles, record["ours"], strict=False):
        axes[0].plot([], [], style, color="black", label=name)
    figure.legend(loc="lower center", ncols=3, fontsize=8)
    figure.suptitle(f"SSD, {record['dtype']}\n{environment.one_line(record['environment'])}", fontsize=8)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
