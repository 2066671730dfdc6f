"""Launch configurations that were measured: one JSON table per device, written by `evals/tune.py`.

A table lies beside this file, or in the folder that the environment variable FASTMAMBA_TUNED names, which comes first:

    {"device": "NVIDIA H200", "ssd": [
        {"shape": {"dtype": "bfloat16", "batch": 1, "tokens": 16384, "heads": 80, "head_dim": 64, "state": 128},
         "config": {every field of SsdConfig}, "us": 253.1, "measured": {date, command, versions}}]}
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Config = TypeVar("Config")

# Beyond four times fewer or more tokens, or rows and heads together, a heuristic knows more than a measurement does.
FARTHEST = 2.0


@dataclass(frozen=True)
class Shape:
    """What a configuration was measured on."""

    dtype: str
    """Of the activations, as torch spells it, without the `torch.`."""
    batch: int
    tokens: int
    heads: int
    head_dim: int
    state: int

    @property
    def bucket(self) -> tuple[str, int, int]:
        """What has to be equal: the dtype, and P and N rounded up to the power of two that a kernel's blocks have."""
        return self.dtype, (self.head_dim - 1).bit_length(), (self.state - 1).bit_length()

    def distance(self, other: Shape) -> tuple[float, float]:
        """How many doublings of the sequence, and of the independent scans (batch x heads), lie between the two."""
        scans = self.batch * self.heads / (other.batch * other.heads)
        return abs(math.log2(self.tokens / other.tokens)), abs(math.log2(scans))


@dataclass(frozen=True)
class Entry(Generic[Config]):
    """One line of a table."""

    shape: Shape
    config: Config
    us: float
    """GPU time that was measured, microseconds."""


def slug(device_name: str) -> str:
    """File name, without the ending, of a device's table: "NVIDIA H200" has nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def load(path: Path, op: str, config_type: Callable[..., Config]) -> tuple[Entry[Config], ...]:
    """Read the entries of one op.

    Raises:
        ValueError: naming the file, the entry and what is wrong with it.
    """
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    entries = table.get(op, []) if isinstance(table, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path} must be an object whose {op!r} is a list of entries")
    return tuple(_entry(entry, f"{path}, entry {i} of {op!r}", config_type) for i, entry in enumerate(entries))


def _entry(entry: Any, where: str, config_type: Any) -> Entry[Any]:
    if not isinstance(entry, dict) or not {"shape", "config", "us"} <= entry.keys():
        raise ValueError(f"{where}: must have shape, config and us")
    made = {}
    for part, kind in (("shape", Shape), ("config", config_type)):
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        given = entry[part] if isinstance(entry[part], dict) else {}
        wrong = [f"{name} is missing" for name in fields if name not in given]
        wrong += [f"{name} is unknown" for name in given if name not in fields]
        for name, value in given.items():
            kinds = {"int": "a positive integer", "str": "a string", "bool": "true or false"}
            expected = fields.get(name)
            empty = expected != "bool" and value in (0, "")
            if expected in kinds and (type(value).__name__ != expected or empty):
                wrong.append(f"{name} must be {kinds[expected]}, got {value!r}")
        if wrong:
            raise ValueError(f"{where}: {part}: {', '.join(wrong)}")
        made[part] = kind(**given)
    us = entry["us"]
    if not isinstance(us, (int, float)) or not us > 0:
        raise ValueError(f"{where}: us must be a positive number of microseconds, got {us!r}")
    return Entry(made["shape"], made["config"], float(us))


def nearest(
    entries: tuple[Entry[Config], ...], shape: Shape, allowed: Callable[[Config], bool] = lambda config: True
) -> Entry[Config] | None:
    """The entry of the same bucket whose shape is nearest, the faster one of equally near ones; None if none is near.

    Args:
        entries: of a table.
        shape: that is to be launched.
        allowed: whether a configuration may be used.
    """
    near = [
        (sum(distance), entry.us, i)
        for i, entry in enumerate(entries)
        if entry.shape.bucket == shape.bucket
        and max(distance := entry.shape.distance(shape)) <= FARTHEST
        and allowed(entry.config)
    ]
    return entries[min(near)[2]] if near else None


def folders() -> list[Path]:
    """Where tables are looked for, first to last."""
    own = os.environ.get("FASTMAMBA_TUNED")
    return [*([Path(own)] if own else []), Path(__file__).parent]


@functools.cache
def entries(device_name: str, op: str, config_type: Callable[..., Config]) -> tuple[Entry[Config], ...]:
    """A device's entries, read once. A table that cannot be used is a warning that says why, and is left out."""
    for folder in folders():
        path = folder / f"{slug(device_name)}.json"
        if path.is_file():
            try:
                return load(path, op, config_type)
            except (OSError, ValueError) as error:
                warnings.warn(f"launch configurations are chosen by heuristics: {error}", RuntimeWarning, stacklevel=2)
    return ()
