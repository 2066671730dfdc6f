"""Profile the SSD with Nsight Compute: what it uses of the machine, what its warps wait for, what it moves.

    python evals/ssd_profile.py --tokens 131072 --output results/ssd_profile.json

Runs `ncu` on `ssd_once.py`, clocks left as they are, and prints a short table of each kernel; the raw page lands beside
the JSON. `--csv FILE` reads such a page of an earlier run instead. Traffic stands beside the least that the call needs,
each input read and each output written once.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment  # noqa: E402
from evals.ssd_grid import Shape  # noqa: E402

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
# What is shown: name, unit, and the metric that has it.
METRICS = (
    ("time", "us", "gpu__time_duration.sum"),
    ("SM throughput", "%", "sm__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("memory throughput", "%", "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"),
    ("L1 and shared memory throughput", "%", "l1tex__throughput.avg.pct_of_peak_sustained_active"),
    ("shared memory wavefronts", "%", "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed"),
    ("L2 throughput", "%", "lts__throughput.avg.pct_of_peak_sustained_elapsed"),
    ("DRAM throughput", "%", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"),
    ("tensor pipe active", "%", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"),
    ("issue slots busy", "%", "smsp__issue_active.avg.pct_of_peak_sustained_active"),
    ("warps active of the most possible", "%", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    ("warps that launch limits allow", "%", "sm__maximum_warps_per_active_cycle_pct"),
    ("L2 hit rate", "%", "lts__t_sector_hit_rate.pct"),
    ("DRAM read", "byte", "dram__bytes_read.sum"),
    ("DRAM written", "byte", "dram__bytes_write.sum"),
    ("L2 traffic with the SMs", "byte", "lts__t_sectors_srcunit_tex.sum"),
    ("blocks", "", "launch__grid_size"),
    ("threads a block", "", "launch__block_size"),
    ("registers a thread", "", "launch__registers_per_thread"),
    ("loads of spilt registers, by warps", "", "smsp__sass_inst_executed_op_local_ld.sum"),
    ("shared memory a block", "byte", "launch__shared_mem_per_block"),
)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active(\.ratio)?$")
SCALES = {
    "sector": 32.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "ns": 1e-3,
    "nsecond": 1e-3,
    "ms": 1e3,
    "msecond": 1e3,
    "s": 1e6,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=80)
    parser.add_argument("--variant", help="of the kernel; without it, whichever serves the shape")
    parser.add_argument("--timeout", type=float, default=120, help="seconds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results/ssd_profile.json"))
    parser.add_argument("--csv", type=Path, help="an earlier raw page")
    options = parser.parse_args()
    shape = Shape("Mamba2-2.7B", 1, options.tokens, options.heads)
    if options.csv:
        page = options.csv.read_text()
        where: dict[str, Any] = {}
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        page = profile(options)
        options.output.with_suffix(".csv").write_text(page)
        where = environment.record(torch.device("cuda"))
    kernels = parse(page)
    if not kernels:
        print(f"the profiler saw no kernel; it said:\n{page[-2000:]}")
        return 1
    least = shape.bytes(torch.bfloat16)
    record = {"environment": where, "shape": vars(shape), "least_bytes": least, "kernels": kernels}
    options.output.write_text(json.dumps(record, indent=1))
    Console(width=150).print(table(kernels, f"{shape.label}, {shape.tokens:,} tokens, bfloat16", least))
    return 0


def profile(options: argparse.Namespace) -> str:
    """The raw page, as CSV."""
    command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, str(Path(__file__).with_name("ssd_once.py"))]
    command += ["--tokens", str(options.tokens), "--heads", str(options.heads)]
    command += ["--variant", options.variant] if options.variant else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


def parse(page: str) -> list[dict[str, Any]]:
    """Every kernel's metrics, in bytes, microseconds and percent, and its stalls in warps per issued instruction."""
    lines = page.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = csv.reader(lines[start:])
    found = []
    for row in rows:
        if len(row) != len(header):
            continue
        values = dict(zip(header, zip(row, units, strict=True), strict=True))
        metrics = {name: _number(*values[metric]) for name, _, metric in METRICS if metric in values}
        stalls = {
            match[1]: _number(*value)
            for name, value in values.items()
            if (match := STALL.match(name)) and not match[1].endswith("not_issued")
        }
        found.append({"kernel": values["Kernel Name"][0], "metrics": metrics, "stalls": stalls})
    return found


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * SCALES.get(unit.partition("/")[0], 1.0)
    except ValueError:
        return None


def table(kernels: list[dict[str, Any]], title: str, least: int) -> Table:
    out = Table(title=title, title_justify="left")
    out.add_column("")
    for kernel in kernels:
        out.add_column(re.split(r"[<(]", kernel["kernel"])[0].rpartition("::")[2], justify="right")
    for name, unit, _ in METRICS:
        if any(kernel["metrics"].get(name) is not None for kernel in kernels):
            out.add_row(name, *(_shown(kernel["metrics"].get(name), unit) for kernel in kernels))
    read = sum((k["metrics"].get("DRAM read") or 0) + (k["metrics"].get("DRAM written") or 0) for k in kernels)
    out.add_section()
    out.add_row("DRAM traffic of all, beside the least", f"{read / 1e6:,.0f} MB, {least / 1e6:,.0f} MB")
    out.add_section()
    totals = [sum(value or 0 for value in kernel["stalls"].values()) for kernel in kernels]
    reasons = {name for kernel in kernels for name in kernel["stalls"]}

    def most(name: str) -> float:
        return max(
            (kernel["stalls"].get(name) or 0) / (total or 1) for kernel, total in zip(kernels, totals, strict=True)
        )

    for name in sorted(reasons, key=most, reverse=True)[:9]:
        shares = [
            100 * (kernel["stalls"].get(name) or 0) / (total or 1)
            for kernel, total in zip(kernels, totals, strict=True)
        ]
        out.add_row(f"warps' time: {name.replace('_', ' ')}", *(f"{share:.0f}%" for share in shares))
    return out


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "byte":
        return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} KB"
    return f"{value:,.1f} {unit}" if unit else f"{value:,.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
