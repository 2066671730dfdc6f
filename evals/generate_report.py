"""Show generation measurements: lines, table, plot. The rows are those of `evals.generate.measure`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

LABELS = {"original": "original", "patched": "patched, no graphs", "graphs": "patched"}
COLOURS = {"original": "#d55e00", "patched": "#56b4e9", "graphs": "#0072b2"}
HEADINGS = ("model", "prompt", "batch", "side", "first token ms", "ms/token", "floor", "tokens/s", "+MiB", "faster")


def floor_ms(model: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Milliseconds that moving the fewest bytes of a step takes at the copy bandwidth of the same run."""
    bandwidth = model.get("copy_bytes_per_s")
    return sum(row["bytes_per_token"].values()) / bandwidth * 1e3 if bandwidth and "bytes_per_token" in row else None


def speedup(row: dict[str, Any], side: str, what: str = "token_ms") -> float | None:
    """How many times faster than the original, where both ran."""
    if row.get("original", {}).get("status") != "ok" or row[side]["status"] != "ok" or side == "original":
        return None
    if what == "total_ms" and row["original"]["new_tokens"] != row[side]["new_tokens"]:
        return None
    return row["original"][what] / row[side][what]


def cells(model: dict[str, Any], row: dict[str, Any], sides: Iterable[str] = tuple(LABELS)) -> list[list[str]]:
    """A line of text for each side of a row."""
    lines = []
    least = floor_ms(model, row)
    for side in (side for side in sides if side in row):
        start = [model["name"], f"{row['tokens']:,}", str(row["batch"]), LABELS[side]]
        found = row[side]
        if found["status"] != "ok":
            lines.append([*start, found["status"], *[""] * 5])
            continue
        gained = [f"{value:.1f}x a token" for value in [speedup(row, side)] if value]
        gained += [f"{value:.1f}x in all" for value in [speedup(row, side, "total_ms")] if value]
        extra = found["peak_extra_bytes"]
        lines.append(
            [
                *start,
                f"{found['first_ms']:,.1f}",
                f"{found['token_ms']:,.2f}",
                f"{least:.2f}" if least else "-",
                f"{found['tokens_per_s']:,.0f}",
                "-" if extra is None else f"{extra / 2**20:,.0f}",
                ", ".join(gained),
            ]
        )
    return lines


def text(models: list[dict[str, Any]]) -> str:
    """All rows, in columns."""
    lines = [list(HEADINGS), *(line for model in models for row in model["rows"] for line in cells(model, row))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def plot(models: list[dict[str, Any]], caption: str, path: Path) -> None:
    """ms a token against the prompt (batch 1) and tokens a second against the batch, one column a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = plt.subplots(2, len(models), figsize=(5.2 * len(models), 7), squeeze=False)
    for (pace, throughput), model in zip(axes.T, models, strict=True):
        shortest = min(row["tokens"] for row in model["rows"])
        for axis, x, y, rows in (
            (pace, "tokens", "token_ms", [row for row in model["rows"] if row["batch"] == 1]),
            (throughput, "batch", "tokens_per_s", [row for row in model["rows"] if row["tokens"] == shortest]),
        ):
            for side, colour in COLOURS.items():
                done = [row for row in rows if row.get(side, {}).get("status") == "ok"]
                if done:
                    axis.plot(*zip(*[(row[x], row[side][y]) for row in done], strict=True), "o-", color=colour,
                              label=LABELS[side])  # fmt: skip
            least = [(row, value) for row in rows if (value := floor_ms(model, row)) is not None]
            if least:
                points = [(row[x], ms if y == "token_ms" else row["batch"] / ms * 1e3) for row, ms in least]
                axis.plot(*zip(*points, strict=True), "k:", label="bytes over copy bandwidth")
            ticks = sorted({row[x] for row in rows})
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else str(t) for t in ticks])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
            axis.grid(alpha=0.3)
        pace.set(title=model["name"], xlabel="prompt, tokens (batch 1)", ylabel="ms a token")
        throughput.set(xlabel=f"batch ({shortest:,} prompt tokens)", ylabel="tokens a second")
        pace.legend(fontsize=8)
    figure.text(0.01, 0.005, caption, fontsize=6.5, wrap=True)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
