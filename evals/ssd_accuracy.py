"""How near our SSD is to the original kernels and to float64: table 2 of "Accelerating Mamba2 with Kernel Fusion".

    python evals/ssd_accuracy.py --output results/ssd_accuracy.json

A line is what an implementation does with the numbers: states between chunks in float32 or in the dtype of x, precision
exact or relaxed. It has the share of elements of y that match mamba_ssm's (chunk 256, the same state dtype) at
atol = rtol = 0, 1e-3 and 1e-2, and what both err against float64. "mamba_ssm chunk 64" is itself at another chunk size:
how well two correct implementations that sum in another order match. mamba_ssm's kernels run untuned here, each in the
cheapest of its configurations.

Errors are root mean squares over several draws of the inputs, shares of matching elements are means: a few heads that
forget fast and hold large states, and in them a few tokens, make up most of the final states' norm, so that one draw of
their roundings differs from another by up to a tenth.

Two kinds of inputs: "init" as Mamba-2 is initialised, centred on zero, and "article" with the means and deviations of
the article's own benchmark, whose outputs are large sums of one sign.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment  # noqa: E402
from evals.ssd_check import errors  # noqa: E402
from evals.ssd_contenders import autotuners, five_kernels  # noqa: E402
from evals.ssd_grid import Shape  # noqa: E402
from fastmamba import configs  # noqa: E402
from fastmamba.ops import ssd  # noqa: E402
from fastmamba.testing import SsdCase  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = (0.0, 1e-3, 1e-2)
DATA = ("init", "article")
CONTROL = "mamba_ssm chunk 64"
PRECISIONS = ("exact", "relaxed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=80)
    parser.add_argument("--dtypes", default="bf16,fp16", help="comma separated (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=8, help="draws of the inputs (default: %(default)s)")
    parser.add_argument(
        "--processes", type=int, default=4, help="that compile and run at a time (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/ssd_accuracy.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if five_kernels() is None:
        parser.error("needs mamba_ssm, which it compares with")
    device = torch.device("cuda", torch.cuda.current_device())
    shape = Shape("Mamba2-2.7B", 1, options.tokens, options.heads)
    if options.part:
        dtype, what = options.part.split(",")
        print(json.dumps(measure(shape, dtype, what, options.seeds, device)))
        return 0

    parts = [CONTROL, *(f"{variant} {p}" for variant in configs.ssd_variants(device) for p in PRECISIONS)]
    jobs = [(dtype, what) for dtype in options.dtypes.split(",") for what in parts]
    command = [sys.executable, __file__, "--tokens", str(options.tokens), "--heads", str(options.heads)]
    command += ["--seeds", str(options.seeds)]

    def run(job: tuple[str, str]) -> dict[str, list[dict[str, Any]]]:
        done = subprocess.run([*command, "--part", ",".join(job)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(job)}: {done.stderr.strip()[-1000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(options.processes) as pool:
        found = dict(zip(jobs, pool.map(run, jobs), strict=True))
    record: dict[str, Any] = {
        "environment": environment.record(device),
        "shape": vars(shape),
        "seeds": options.seeds,
        "tables": [],
    }
    console = Console(width=150)
    console.print(environment.one_line(record["environment"]), soft_wrap=True)
    for data in DATA:
        for dtype in options.dtypes.split(","):
            lines = [line for what in parts for line in found[dtype, what][data]]
            record["tables"].append({"data": data, "dtype": dtype, "lines": lines})
            console.print(table(f"{data} inputs, {dtype}, {shape.label}, {shape.tokens:,} tokens", lines))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1))
    return 0


def measure(shape: Shape, dtype: str, what: str, seeds: int, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """Some lines of a dtype's tables, by the kind of inputs: the control's, or those of a variant and precision."""
    for tuner in autotuners():
        tuner.configs = [min(tuner.configs, key=shared_memory)]
    found: dict[str, list[list[dict[str, Any]]]] = {data: [] for data in DATA}
    for seed in range(seeds):
        case = shape.case(DTYPES[dtype], device, seed)
        for data in DATA:
            found[data].append(compare(case if data == "init" else article_inputs(case, seed), what))
    return {data: [pooled(draws) for draws in zip(*lines, strict=True)] for data, lines in found.items()}


def pooled(draws: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """The same line for several draws of the inputs, as one."""
    line: dict[str, Any] = {"line": draws[0]["line"]}
    line["match"] = {at: statistics.fmean(draw["match"][at] for draw in draws) for at in draws[0]["match"]}
    for which in ("error", "original_error"):
        line[which] = {
            of: math.sqrt(statistics.fmean(draw[which][of] ** 2 for draw in draws)) for of in draws[0][which]
        }
    line["worst_of_a_draw"] = {
        of: max(draw["error"][of] / draw["original_error"][of] for draw in draws) for of in draws[0]["error"]
    }
    return line


def shared_memory(config: Any) -> int:
    """Roughly what a configuration of mamba_ssm's needs: the product of its block sizes, times its stages."""
    return math.prod(config.kwargs.values()) * config.num_stages


def article_inputs(case: SsdCase, seed: int) -> SsdCase:
    """The same shapes, dtypes and strides with the article's distributions."""
    generator = torch.Generator(case.x.device).manual_seed(seed)

    def normal(like: Tensor, mean: float, deviation: float) -> Tensor:
        return torch.randn(like.shape, device=like.device, generator=generator) * deviation + mean

    for name, mean, deviation in (("x", 5, 2), ("B", 7, 3), ("C", 20, 5), ("dt", 0.5, 0.2)):
        tensor = getattr(case, name)
        tensor.copy_(normal(tensor, mean, deviation))
    assert case.D is not None and case.dt_bias is not None
    return dataclasses.replace(
        case, A=normal(case.A, -10, 3), D=normal(case.D, 1.2, 0.5), dt_bias=normal(case.dt_bias, -5, 0.5)
    )


def compare(case: SsdCase, what: str) -> list[dict[str, Any]]:
    """A line for each dtype of the states."""
    dtypes = (torch.float32, case.x.dtype)
    originals = [original(case, dtype) for dtype in dtypes]
    if what == CONTROL:
        results = [original(case, dtype, chunk=64) for dtype in dtypes]
    else:
        variant, precision = what.split()
        with configs.override(variant):
            call: Any = ssd
            options = [case.keywords() | {"state_dtype": dtype, "precision": precision} for dtype in dtypes]
            results = [call(*case.arguments(), **some, backend="triton") for some in options]
    off = errors(case, [*originals, *results])
    return [
        {
            "line": f"{what}, {_name(dtype)} states",
            "match": {str(tolerance): match(results[i][0], originals[i][0], tolerance) for tolerance in TOLERANCES},
            "error": dict(zip(("y", "states"), off[2 + i], strict=True)),
            "original_error": dict(zip(("y", "states"), off[i], strict=True)),
        }
        for i, dtype in enumerate(dtypes)
    ]


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def match(actual: Tensor, expected: Tensor, tolerance: float) -> float:
    """Share of elements with |actual - expected| <= tolerance + tolerance |expected|."""
    actual, expected = actual.float(), expected.float()
    return ((actual - expected).abs() <= tolerance + tolerance * expected.abs()).double().mean().item()


def original(case: SsdCase, state: torch.dtype, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """mamba_ssm's five kernels, with the states between chunks in a given dtype (it takes the dtype of C itself)."""
    x, dt, A, B, C, D, z, dt_bias, initial_states = case.arguments()
    rest: dict[str, Any] = dict(D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
    rest |= dict(dt_softplus=case.dt_softplus, dt_limit=case.dt_limit)
    module: Any = five_kernels()
    with states_in(module, state):
        y, *_, final = module._mamba_chunk_scan_combined_fwd(x, dt, A, B, C, chunk, **rest)
    return y, final


@contextlib.contextmanager
def states_in(ssd_combined: Any, dtype: torch.dtype) -> Iterator[None]:
    pass_states = ssd_combined._state_passing_fwd

    def passing(*arguments: Any, **options: Any) -> Any:
        return pass_states(*arguments, **options | {"out_dtype": dtype})

    with mock.patch.object(ssd_combined, "_state_passing_fwd", passing):
        yield


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    out = Table(title=title, title_justify="left")
    for header in ("", *(f"match at {tolerance:g}" for tolerance in TOLERANCES)):
        out.add_column(header, justify="right" if header else "left")
    for what in ("y", "states"):
        out.add_column(f"error of {what}", justify="right")
        out.add_column("original's", justify="right")
    for line in lines:
        cells = [f"{100 * share:.3f}%" for share in line["match"].values()]
        for what in ("y", "states"):
            cells += [f"{line[error][what]:.2e}" for error in ("error", "original_error")]
        out.add_row(line["line"], *cells)
    return out


if __name__ == "__main__":
    raise SystemExit(main())
