"""What patch() did to each layer, and which calls the fast forward handed back to the original one."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

GRADIENTS = "gradients are needed"


class FastMambaWarning(UserWarning):
    """A patched model runs correctly, but not the way its user probably meant."""


@dataclass(frozen=True)
class LayerReport:
    """One mixer layer."""

    name: str
    """Its name in the model."""
    mixer: str
    """Its class."""
    device: str
    """Where its weights are (or are brought to, if they are offloaded)."""
    status: str
    """"fast", or "original" for a layer that runs transformers' forward."""
    scope: str | None = None
    """What is fast in it: "block" (the mixer and the layer around it), "mixer" or "ssd"."""
    backends: dict[str, str] = field(default_factory=dict)
    """What serves each op, "triton" or "torch"."""
    ssd_variant: str = ""
    """Which of the scan's Triton kernels serves activations of the layer's dtype: "hopper" or "portable"."""
    precision: str = "exact"
    """As given to `patch`."""
    reason: str = ""
    """Why the layer is not fast."""
    original_calls: dict[str, int] = field(default_factory=dict)
    """Calls that a fast layer handed to the original forward, by reason."""


@dataclass(frozen=True)
class GraphReport:
    """What became of a model's one-token calls."""

    model: str
    """The class whose forward is recorded."""
    recorded: int = 0
    """Forwards recorded and held: one for each batch size, dtype and way to compute experts."""
    bytes: int = 0
    """Device memory that their graphs take."""
    replays: int = 0
    """Calls that were replayed."""
    eager_calls: dict[str, int] = field(default_factory=dict)
    """Calls that were not, by reason."""

    def __str__(self) -> str:
        held = f"{self.recorded} recorded, {self.bytes / 2**20:,.0f} MiB, {self.replays} replays"
        calls = [f"{count}x eager: {reason}" for reason, count in self.eager_calls.items()]
        return "; ".join([f"CUDA graphs of {self.model}: {held}", *calls])


@dataclass(frozen=True)
class BlockReport:
    """The layers around the mixers: their norms, residual adds, multilayer perceptrons and experts."""

    layers: int
    """How many there are."""
    fast: int
    """How many have the forward of scope="block"."""
    reasons: tuple[str, ...] = ()
    """Why others, or experts of theirs, have not."""
    original_calls: dict[str, int] = field(default_factory=dict)
    """Calls that fast layers handed to the original forward, by reason."""
    expert_calls: dict[str, int] = field(default_factory=dict)
    """Calls on a GPU whose experts ran transformers' own code, by reason."""

    def __str__(self) -> str:
        calls = [f"{count}x original: {reason}" for reason, count in self.original_calls.items()]
        calls += [f"{count}x transformers' experts: {reason}" for reason, count in self.expert_calls.items()]
        return "; ".join(
            [f"norms and residual adds of {self.fast} of {self.layers} layers fused", *self.reasons, *calls]
        )


@dataclass(frozen=True)
class PiecesReport:
    """What became of calls longer than `prefill_chunk_tokens`."""

    model: str
    """The class whose calls are cut."""
    tokens: int
    """The most tokens of a piece."""
    cut: int = 0
    """Calls that were cut."""
    whole_calls: dict[str, int] = field(default_factory=dict)
    """Calls that were longer and ran as they are, by reason."""

    def __str__(self) -> str:
        calls = [f"{count}x whole: {reason}" for reason, count in self.whole_calls.items()]
        return "; ".join([f"calls of {self.model} cut into pieces of {self.tokens:,} tokens: {self.cut}", *calls])


@dataclass(frozen=True)
class Report:
    """The mixer layers of a model. `print` it for a table."""

    model: str
    """The model's class."""
    layers: tuple[LayerReport, ...] = ()
    note: str = ""
    graphs: tuple[GraphReport, ...] = ()
    """What became of one-token calls, for each model in it that takes them from CUDA graphs."""
    blocks: BlockReport | None = None
    """The layers around the mixers; None where scope="block" has nothing to do."""
    pieces: tuple[PiecesReport, ...] = ()
    """What became of long calls, for each model in it that cuts them."""

    @property
    def patched(self) -> int:
        """How many layers have the fast forward."""
        return sum(layer.status == "fast" for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"fastmamba: {self.patched} of {len(self.layers)} Mamba-2 layers of {self.model} patched"]
        if self.note:
            lines.append(self.note)
        header = ("layer", "class", "device", "status", "backend", "reason")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        if self.layers:
            lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines += map(str, (*([self.blocks] if self.blocks else []), *self.pieces, *self.graphs))
        return "\n".join(line.rstrip() for line in lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    status = layer.status if layer.scope != "ssd" else f"{layer.status} ({layer.scope} only)"
    served = sorted(set(layer.backends.values()))
    # One word where one backend serves everything.
    backend = served[0] if len(served) == 1 else ", ".join(f"{op}: {name}" for op, name in layer.backends.items())
    if layer.ssd_variant:
        backend += f" (ssd: {layer.ssd_variant}{', relaxed' if layer.precision == 'relaxed' else ''})"
    calls = ", ".join(f"{count}x original: {reason}" for reason, count in layer.original_calls.items())
    return layer.name, layer.mixer, layer.device, status, backend, layer.reason or calls


# Beside the modules and not on them: neither a pickle nor a deepcopy of a model carries counts.
_original_calls: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_warned: set[str] = set()


def count_original(module: nn.Module, reason: str) -> None:
    """Note that a patched module ran its original forward."""
    _original_calls.setdefault(module, Counter())[reason] += 1


def original_calls(module: nn.Module) -> dict[str, int]:
    """How often a module's fast forward ran the original one, by reason."""
    return dict(_original_calls.get(module, ()))


def forget_calls(module: nn.Module) -> None:
    """Start a module's counts anew."""
    _original_calls.pop(module, None)


def warn_once(message: str) -> None:
    """Warn, once per process, of something a user would want to change."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, FastMambaWarning, stacklevel=2)
