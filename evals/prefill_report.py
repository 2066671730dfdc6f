"""Show prefill measurements: lines, table, plot. The rows are those of `evals.prefill.measure`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
from rich import box  # noqa: E402
from rich.table import Table  # noqa: E402

COLOURS = {"original": "#d55e00", "patched": "#0072b2"}


def milliseconds(side: dict[str, Any], unit: str = "") -> str:
    """Median and range, such as 12.3 (12.1-12.9), or what became of it."""
    if side["status"] != "ok":
        return side["status"]
    return f"{_short(side['median_ms'])} ({_short(side['min_ms'])}-{_short(side['max_ms'])}){unit}"


def memory(side: dict[str, Any]) -> str:
    extra = side.get("peak_extra_bytes")
    return "-" if extra is None else f"{extra / 2**20:,.0f}"


def agreement(row: dict[str, Any]) -> str:
    check = row["check"]
    if check is None:
        return "not compared"
    error = check.get("patched_error", check["difference"])
    verdict = "agree" if check["passed"] else "DIFFER"
    whole = check.get("original_in_one_piece")
    note = f"; original in one piece is off by {whole:.1e}" if whole is not None else ""
    return f"{verdict} ({error:.1e}, limit {check['limit']:.1e}){note}"


def line(name: str, row: dict[str, Any]) -> str:
    speedup = f"{row['speedup']:.1f}x" if row["speedup"] else "-"
    return (
        f"{name} {row['tokens']:,} tokens: original {milliseconds(row['original'], ' ms')}, "
        f"patched {milliseconds(row['patched'], ' ms')}, {speedup}, outputs {agreement(row)}"
    )


def table(models: list[dict[str, Any]], plain: bool) -> Table:
    result = Table(box=box.ASCII if plain else box.ROUNDED)
    result.add_column("model", no_wrap=True)
    for heading in ("tokens", "original ms", "patched ms", "faster", "original +MiB", "patched +MiB"):
        result.add_column(heading, justify="right", no_wrap=plain)
    result.add_column("outputs", overflow="fold")  # the one that gives way where the line is too short
    for model in models:
        for row in model["rows"]:
            result.add_row(
                model["name"],
                f"{row['tokens']:,}",
                milliseconds(row["original"]),
                milliseconds(row["patched"]),
                f"{row['speedup']:.1f}x" if row["speedup"] else "-",
                memory(row["original"]),
                memory(row["patched"]),
                agreement(row),
            )
        result.add_section()
    return result


def plot(models: list[dict[str, Any]], caption: str, path: Path) -> None:
    """Time against context and the factor gained, one column a model; what failed is marked where it ended."""
    figure, axes = plt.subplots(2, len(models), figsize=(5.2 * len(models), 7), squeeze=False, sharex="col")
    for (times, factors), model in zip(axes.T, models, strict=True):
        rows = model["rows"]
        for side, colour in COLOURS.items():
            done = [row for row in rows if row[side]["status"] == "ok"]
            x = [row["tokens"] for row in done]
            y = [row[side]["median_ms"] for row in done]
            times.plot(x, y, "o-", color=colour, label=side)
            times.fill_between(
                x, [r[side]["min_ms"] for r in done], [r[side]["max_ms"] for r in done], color=colour, alpha=0.2
            )
            failed = next((row for row in rows if row[side]["status"] not in ("ok", "not run")), None)
            if failed:
                times.axvline(failed["tokens"], color=colour, linestyle=":")
                end = (failed["tokens"], 0.98)
                what = f"{side}: {failed[side]['status']} "
                times.text(
                    *end, what, transform=times.get_xaxis_transform(), rotation=90, ha="right", va="top", fontsize=8
                )
        times.set(title=model["name"], xscale="log", yscale="log")
        low, high = times.get_ylim()
        times.set_ylim(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        )  # decades, so that labels fit
        times.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        times.legend(loc="upper left")
        gained = [row for row in rows if row["speedup"]]
        factors.plot([row["tokens"] for row in gained], [row["speedup"] for row in gained], "o-", color="#009e73")
        for row in gained:
            factors.annotate(
                f"{row['speedup']:.1f}",
                (row["tokens"], row["speedup"]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
            )
        factors.axhline(1, color="0.6", linewidth=0.8)
        factors.set(xlabel="context, tokens", xscale="log")
        factors.set_ylim(0, 1.25 * max([row["speedup"] for row in gained], default=1.0))
        ticks = [row["tokens"] for row in rows]
        factors.set_xticks(ticks, [short_count(tokens) for tokens in ticks])
        factors.minorticks_off()
        for axis in (times, factors):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("prefill, ms")
    axes[1, 0].set_ylabel("times faster, patched")
    figure.text(0.01, 0.005, caption, fontsize=6.5, wrap=True)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def short_count(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"
