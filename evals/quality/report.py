"""The table and the plot of a quality report."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evals import environment


def show(report: dict[str, Any], console: Console) -> None:
    for model in report["models"]:
        _show_text(model, console)
        _show_tasks(model, console)
    console.print(environment.one_line(report["environment"]), style="dim", highlight=False)
    broken = report["broken"]
    if broken:
        console.print("Parity is broken:", style="bold red")
        for line in broken:
            console.print(f"  {line}", markup=False, highlight=False)
    else:
        console.print("Parity holds.", style="bold green")


def _show_text(model: dict[str, Any], console: Console) -> None:
    if not model["text"]:
        return
    table = Table(title=f"{model['name']}: distance from the float32 original on {model['tokens']:,} tokens of text")
    for name in ("run", "way", "KL", "p99", "max", "bound", "top-1 agreement", "nats a token", ""):
        table.add_column(name, justify="left" if name in ("run", "way", "") else "right", no_wrap=name == "run")
    for entry in model["text"]:
        table.add_row(
            entry["run"],
            entry["way"],
            *(f"{entry[key]:.2e}" for key in ("kl", "kl p99", "kl max")),
            "" if entry["bound"] is None else f"{entry['bound']:.2e}",
            f"{100 * entry['top-1 agreement']:.2f}%",
            f"{entry['nats a token']:.5f}",
            "" if entry["bound"] is None else "[red]broken" if entry["broken"] else "ok",
        )
    console.print(table)


def _show_tasks(model: dict[str, Any], console: Console) -> None:
    if not model["tasks"]:
        return
    table = Table(title=f"{model['name']}: lm-eval {model['lm_eval']}, original and patched on the same documents")
    for name in ("run", "task", "metric", "n", "original", "patched", "difference", "same choice", "|Δ log lik| 50 / 99 / max", ""):  # fmt: skip # noqa: E501
        table.add_column(name, justify="left" if name in ("run", "task", "metric", "") else "right")
    for entry in model["tasks"]:
        gaps = entry["loglikelihood"]
        table.add_row(
            entry["run"],
            entry["task"],
            entry["metric"].removesuffix(",none"),
            str(entry["documents"]),
            f"{entry['original']:.4f} ± {entry['original_stderr']:.4f}",
            f"{entry['patched']:.4f} ± {entry['patched_stderr']:.4f}",
            f"{entry['difference']:+.2e} ± {entry['difference_stderr']:.1e}",
            "" if entry["identical"] is None else f"{100 * entry['identical']:.1f}%",
            "" if gaps is None else " / ".join(f"{gaps[key]:.1e}" for key in ("median", "p99", "max")),
            "[red]broken" if entry["broken"] else "ok",
        )
    console.print(table)


def plot(report: dict[str, Any], path: Path) -> None:
    """KL by position, and paired differences in standard errors, a row of axes per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = report["models"]
    draw = {"text": _draw_text, "tasks": _draw_tasks}
    kinds = [kind for kind in draw if any(model[kind] for model in models)]
    size = (6.5 * len(kinds), 4.2 * len(models))
    figure, axes = plt.subplots(len(models), len(kinds), figsize=size, squeeze=False, layout="constrained")
    for row, model in zip(axes, models, strict=True):
        for axis, kind in zip(row, kinds, strict=True):
            draw[kind](model, axis)
    figure.suptitle(textwrap.fill(environment.one_line(report["environment"]), 105 * len(kinds)), fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_text(model: dict[str, Any], axis: Any) -> None:
    entries = model["text"]
    whole = {entry["run"] for entry in entries if entry["way"] == "one call"}
    for entry in entries:
        # An original that cannot take the text in one call is shown as it went, in pieces.
        if entry["way"] != ("one call" if entry["run"] in whole else "pieces"):
            continue
        blocks = entry["by position"]
        middle = [(block["from"] + block["to"]) / 2 for block in blocks]
        kls = [max(block["kl"], 1e-16) for block in blocks]
        axis.plot(middle, kls, "--" if entry["bound"] is None else "-", label=entry["run"], marker=".")
    for bound in {e["bound"] for e in entries if e["bound"] is not None and e["way"] == "one call"}:
        axis.axhline(bound, color="red", linewidth=0.8, linestyle=":")
    axis.set(yscale="log", xlabel="token", ylabel="KL from the float32 original, nats", title=model["name"])
    axis.legend(fontsize=7)


def _draw_tasks(model: dict[str, Any], axis: Any) -> None:
    names, gaps = [], []
    for entry in model["tasks"]:
        error, gap = entry["difference_stderr"], entry["difference"]
        names.append(f"{entry['run']}: {entry['task']} {entry['metric'].removesuffix(',none')}")
        gaps.append(0.0 if gap == 0 else gap / error if error > 0 else float("nan"))
    axis.barh(range(len(names)), gaps, color=["red" if e["broken"] else "tab:blue" for e in model["tasks"]])
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.axvspan(-2, 2, color="0.9", zorder=0)
    axis.invert_yaxis()
    axis.set(xlabel="paired difference, in its standard errors", title=f"{model['name']}: patched - original")


def finite(value: Any) -> Any:
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
