"""Time `model.generate` end to end: as loaded, patched without CUDA graphs, and patched.

    python evals/generate_speed.py --model mamba2-2.7b --tokens 1K,16K,256K --batch 1
    python evals/generate_speed.py --model granite-4.0-h-micro --tokens 1K --batch 1,8,32,128 --slow-tokens 32

Greedy, on random prompts. For each prompt length with the first batch size, and each batch size with the first length:
time to the first token, median time from one token to the next, tokens a second, peak memory above the model's, and
beside them the floor: the fewest bytes of a step over the copy bandwidth measured in the same process. Prints a table,
writes JSON and a plot. Exits 1 when a patched run fails, falls back to the original forward, or graphs change a token.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals is not installed

from evals import environment, generate, generate_report, shapes  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    settings = generate.Settings(
        device=options.device,
        dtype=options.dtype,
        layers=options.layers,
        new_tokens=options.new_tokens,
        slow_tokens=options.slow_tokens,
        end_to_end=options.end_to_end,
        most_original=options.most_original,
        repeats=options.repeats,
        seed=options.seed,
        sides=tuple(side for side in generate.SIDES if side in options.sides),
        time_limit=options.time_limit,
    )
    where = environment.record(torch.device(options.device))
    record: dict[str, Any] = {"environment": where, "settings": asdict(settings), "models": []}
    options.output.mkdir(parents=True, exist_ok=True)
    print(environment.one_line(where), flush=True)
    cases = [(tokens, options.batch[0]) for tokens in options.tokens]
    cases += [(options.tokens[0], batch) for batch in options.batch[1:]]
    faults: list[str] = []
    for name in options.model:
        model: dict[str, Any] = {"name": name + (f", {options.layers} layers" if options.layers else ""), "rows": []}
        record["models"].append(model)

        def heard(row: dict[str, Any], side: str, model: dict[str, Any] = model) -> None:
            """Show and keep a row as far as it has come: a run that is cut off loses the side it was at."""
            if row not in model["rows"]:
                model["rows"].append(row)
            (options.output / "generate_speed.json").write_text(json.dumps(record, indent=1) + "\n")
            print("  ".join(generate_report.cells(model, row, (side,))[0]), flush=True)

        try:
            for row in generate.measure(name, cases, settings, model.update, heard):
                if row not in model["rows"]:  # none of its sides was run
                    model["rows"].append(row)
                faults += judge(model["name"], row)
        except RuntimeError as error:
            faults.append(str(error))
    record["passed"] = not faults
    (options.output / "generate_speed.json").write_text(json.dumps(record, indent=1) + "\n")
    if done := [model for model in record["models"] if model["rows"]]:
        print(f"generate, {options.dtype}, {options.new_tokens} new tokens")
        print(generate_report.text(done))
        try:
            generate_report.plot(done, environment.one_line(where), options.output / "generate_speed.png")
        except ImportError:
            print("matplotlib is not installed: no plot")
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else 0


def judge(name: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with a row. An original that fails is a result."""
    place = f"{name}, {row['tokens']:,} tokens, batch {row['batch']}"
    faults = []
    for side in ("patched", "graphs"):
        found = row.get(side)
        if found is None:
            continue
        if found["status"] != "ok":
            faults.append(f"{place}: {side} {found['status']}: {found.get('message')}")
        elif found["original_calls"]:
            faults.append(f"{place}: {side} layers ran the original forward: {found['original_calls']}")
    if row.get("same_tokens") is False:
        faults.append(f"{place}: graphs changed the tokens")
    return faults


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
    parser.add_argument("--tokens", type=counts, default="1K", help="prompt lengths, such as 1K,16K (default: 1K)")
    parser.add_argument("--batch", type=counts, default="1", help="batch sizes, such as 1,8,32 (default: 1)")
    parser.add_argument("--new-tokens", type=positive, default=256, help="(default: 256)")
    parser.add_argument(
        "--slow-tokens", type=positive, help="new tokens for the sides without graphs (default: as many)"
    )
    parser.add_argument("--end-to-end", action="store_true", help="in the first case, all sides generate as many")
    parser.add_argument(
        "--most-original",
        type=positive,
        metavar="TOKENS",
        help="past so many tokens of prompts, leave the original out",
    )
    parser.add_argument("--sides", default=",".join(generate.SIDES), help="(default: %(default)s)")
    parser.add_argument("--layers", type=positive, help="keep this many layers")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each side; the middle one is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder to write to (default: results)")
    parser.add_argument("--time-limit", type=float, default=600.0, metavar="S", help="seconds a row may take")
    options = parser.parse_args(argv)
    options.model = options.model or ["mamba2-2.7b"]
    options.sides = options.sides.split(",")
    if unknown := set(options.sides) - set(generate.SIDES):
        parser.error(f"argument --sides: unknown {', '.join(sorted(unknown))}; there are {', '.join(generate.SIDES)}")
    return options


def counts(text: str) -> list[int]:
    """1,2K -> [1, 2048]."""
    try:
        return [int(part[:-1]) * 1024 if part[-1:] in "Kk" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 512 or 4K, got {text!r}") from None


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
