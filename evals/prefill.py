"""Time prefill of one model, original against patched, in a process of its own.

The process is what makes a crash an entry in the table: an illegal memory access ends a CUDA context, and an original
that outgrows the memory may be killed. The patched figures are then taken again in a fresh process, and the run goes
on.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import fastmamba
from evals import memory, shapes
from evals.prefill_check import checked_logits, compare, final_hidden_states, relative_error, untuned
from evals.prefill_floor import Rates, floor
from evals.prefill_kinds import gpu_time
from evals.timing import summary, timed

SIDES = ("patched", "original")  # patched first: what an original breaks must not cost its figures
SSD_ONLY = "ssd"  # a third side: patched with scope="ssd"

# How far patched and original logits may differ where no float32 run can judge both (relative, root mean square).
# Two runs that each round at every layer differ by more than either errs; on CUDA, kernels that transformers picks up
# multiply float32 in TF32.
DIFFERENCE_BOUND = {
    ("float32", "cpu"): 1e-4,
    ("float32", "cuda"): 1e-2,
    ("float16", "cpu"): 2e-2,
    ("float16", "cuda"): 2e-2,
    ("bfloat16", "cpu"): 1e-1,
    ("bfloat16", "cuda"): 1e-1,
}
# Runs of each side a row: one compared, one whose memory is measured, and those that are timed.
UNTIMED_RUNS = 2
LONGEST_SEGMENT = 16 * 1024
LONG_MS = 500.0  # a call this long is timed the first time
SEGMENTED_SECONDS = 30.0  # what the original in segments may take


@dataclass(frozen=True)
class Settings:
    """What every model of a run is measured with."""

    device: str = "cpu"
    dtype: str = "float32"
    layers: int | None = None
    batch: int = 1
    repeats: int = 5
    seed: int = 0
    scope: str = "block"
    backend: str = "auto"
    original: bool = True
    reference_tokens: int = 4096
    time_limit: float = 600.0
    sides: tuple[str, ...] = SIDES
    lengths: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Where a side is to run, if not at every length."""
    thrifty: bool = False
    """On a GPU, take peak memory in the timed runs instead of in a run of its own."""
    enough: float = math.inf
    """Seconds of timed runs of all sides after which a row is not repeated any more."""
    breakdown: bool | frozenset[int] = False
    """On a GPU, also say what the call would take at best and, at these lengths (True: all), where its time goes."""
    prefill_chunk_tokens: int | None = None
    checks: bool = True
    """Without, nothing runs for the sake of a comparison alone."""
    own_process: bool = True
    """Without, a crash ends the run, which starts seconds sooner."""

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if (self.dtype, torch.device(self.device).type) not in DIFFERENCE_BOUND:
            raise ValueError(f"no comparison bound for dtype {self.dtype} on {self.device}")

    def runs(self, side: str, tokens: int) -> bool:
        return tokens in self.lengths.get(side, (tokens,))

    @property
    def bound(self) -> float:
        return DIFFERENCE_BOUND[self.dtype, torch.device(self.device).type]


def load(name: str, settings: Settings) -> PreTrainedModel:
    """A built-in shape with random weights, or a model from the hub or a folder."""
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    if name in shapes.NAMES:
        return shapes.build(name, settings.layers, dtype, device, settings.seed)
    config = AutoConfig.from_pretrained(name)
    if settings.layers is not None:
        config.num_hidden_layers = min(settings.layers, config.num_hidden_layers)
        if "layer_types" in vars(config):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype).to(device).eval()


def patch(model: PreTrainedModel, settings: Settings, side: str) -> fastmamba.Report:
    """Patch a model for a side."""
    if side == SSD_ONLY:
        return fastmamba.patch(model, scope="ssd", backend=settings.backend)
    pieces = settings.prefill_chunk_tokens
    return fastmamba.patch(model, scope=settings.scope, backend=settings.backend, prefill_chunk_tokens=pieces)


# ---- inside the process -------------------------------------------------------------------------------------------


class Measurement:
    """One model and what is done with it. `phase` hears of each run before it starts, so that a death has an author."""

    def __init__(self, model: PreTrainedModel, settings: Settings, phase: Callable[[str], None]) -> None:
        self.model, self.settings, self.phase = model, settings, phase
        self.device = torch.device(settings.device)
        self._rates: Rates | None = None

    def row(self, tokens: int, sides: list[str], segments: tuple[str, int] | None, checks: bool) -> dict[str, Any]:
        """Timings, memory and the comparison at one length.

        `segments` names the side and the segment length of a prefill in pieces, to compare with where the original
        cannot run in one or disagrees. Without `checks`, nothing runs for the sake of the comparison alone.
        """
        generator = torch.Generator().manual_seed(self.settings.seed + tokens)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (self.settings.batch, tokens), generator=generator).to(self.device)
        outcomes: dict[str, dict[str, Any]] = {}
        logits: dict[str, torch.Tensor] = {}
        peaks: dict[str, int | None] = {}
        timings: dict[str, list[float]] = {side: [] for side in sides}
        for side in sides:
            outcomes[side], found = self._attempt(side, self._logits, ids)  # also the warm-up
            if found is not None:
                logits[side] = found
        together = self.settings.thrifty and self.device.type == "cuda"
        for side in sides:
            if outcomes[side]["status"] == "ok" and not together:
                outcomes[side], peaks[side] = self._attempt(side, self._peak, ids)
        spent = 0.0
        for _ in range(self.settings.repeats):
            if spent >= self.settings.enough:
                break
            for side in sides:  # taken in turn, so that a machine that slows down slows both
                if outcomes[side]["status"] == "ok":
                    with memory.Peak(self.device) if together else contextlib.nullcontext() as peak:
                        outcomes[side], ms = self._attempt(side, self._timed, ids)
                    if ms is not None:
                        timings[side].append(ms)
                        spent += ms / 1e3
                    if peak is not None:
                        peaks[side] = peak.extra
        for side in sides:
            if outcomes[side]["status"] == "ok":
                outcomes[side] |= summary(timings[side]) | {"peak_extra_bytes": peaks[side]}
        row = {"tokens": tokens, "check": self._check(ids, logits, segments if checks else None, checks)} | outcomes
        wanted = self.settings.breakdown
        if wanted and self.device.type == "cuda":
            for side in sides if wanted is True or tokens in wanted else ():
                if outcomes[side]["status"] == "ok":
                    profiled, spent = self._attempt(side, gpu_time, lambda: self._prefill(ids))
                    outcomes[side] |= {"gpu": spent} if profiled["status"] == "ok" else {}
            row["floor"] = self._floor(self.settings.batch, tokens)
        return row

    def _floor(self, batch: int, tokens: int) -> dict[str, float] | None:
        if self._rates is None:
            self._rates = Rates(self.device)
        return floor(self.model, self._rates, batch, tokens)

    def _attempt(
        self, side: str, call: Callable[..., Any], *args: Any, phase: str | None = None
    ) -> tuple[dict[str, Any], Any]:
        """Run `call` with the model on `side`. Running out of memory is an outcome; anything else ends the process."""
        self.phase(phase or side)
        if side != "original":
            patch(self.model, self.settings, side)
        try:
            with torch.no_grad():
                value = call(*args)
            # A patched model that quietly ran the original forward would compare well and prove nothing.
            calls = [layer.original_calls for layer in fastmamba.report(self.model).layers if side != "original"]
            return {"status": "ok", "original_calls": next(filter(None, calls), {})}, value
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            message = str(error).splitlines()[0]
        finally:
            if side != "original":
                fastmamba.unpatch(self.model)
        gc.collect()  # the traceback held what did not fit
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {"status": "out of memory", "message": message}, None

    def _prefill(self, ids: torch.Tensor) -> object:
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def _timed(self, ids: torch.Tensor) -> float:
        """Milliseconds of a call; of a second one where the first is short.

        Each run patches anew, and a patched model prepares in its first call what later ones repeat.
        """
        first = timed(lambda: self._prefill(ids), self.device)
        return first if first >= LONG_MS else timed(lambda: self._prefill(ids), self.device)

    def _peak(self, ids: torch.Tensor) -> int | None:
        with memory.Peak(self.device) as peak:
            self._prefill(ids)
        return peak.extra

    def _logits(self, ids: torch.Tensor, segment: int | None = None) -> torch.Tensor:
        return checked_logits(self.model, ids, segment or ids.shape[1]).cpu()

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return final_hidden_states(self.model, ids).cpu()

    def _float32(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = copy.deepcopy(self.model).float()
        with untuned():
            return checked_logits(model, ids, ids.shape[1]).cpu(), final_hidden_states(model, ids).cpu()

    def _check(
        self, ids: torch.Tensor, logits: dict[str, torch.Tensor], segments: tuple[str, int] | None, reference: bool
    ) -> dict[str, Any] | None:
        if "patched" not in logits:
            return None
        result = None
        if "original" in logits:
            exact: Any = None
            if reference and self.settings.dtype != "float32" and ids.shape[1] <= self.settings.reference_tokens:
                _, exact = self._attempt("original", self._float32, ids, phase="check")
            result = compare(
                logits["patched"], logits["original"], None if exact is None else exact[0], self.settings.bound
            )
            for side in SIDES if exact is not None else ():
                _, hidden = self._attempt(side, self._hidden, ids, phase="check")
                result[f"{side}_hidden_error"] = None if hidden is None else relative_error(hidden, exact[1])
        if segments is None or (result and (result["passed"] or segments[0] != "original")):
            return result
        # No original to compare with, or one that may itself be wrong, as kernels with 32-bit offsets are at length.
        side, length = segments
        _, pieces = self._attempt(side, self._logits, ids, length, phase="check")
        if pieces is None:
            return result
        second = compare(logits["patched"], pieces, None, self.settings.bound)
        second["against"] = f"{side} prefill in segments of {length:,} tokens"
        if result is None:
            return second
        return second | {"original_in_one_piece": result["difference"]} if second["passed"] else result


def _ready(name: str, settings: Settings, phase: Callable[[str], None]) -> tuple[Measurement, dict[str, Any]]:
    """The model to measure, and what there is to say of it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load(name, settings)
    report = str(patch(model, settings, "patched"))
    fastmamba.unpatch(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    info = {"parameters": parameters, "config": model.config.to_diff_dict(), "report": report}
    return Measurement(model, settings, phase), info


def _serve(pipe: multiprocessing.connection.Connection, name: str, settings: Settings) -> None:
    """The process: load the model, answer jobs, end at None. Each message is (kind, value)."""
    if torch.device(settings.device).type == "cpu":
        memory.limit()
    try:
        measurement, info = _ready(name, settings, lambda side: pipe.send(("phase", side)))
        pipe.send(("ready", info))
        while (job := pipe.recv()) is not None:
            pipe.send(("row", measurement.row(*job)))
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {str(error).strip()}"))
        os._exit(1)  # a broken CUDA context may hang in its own clean-up


# ---- outside it ---------------------------------------------------------------------------------------------------


class _Died(Exception):
    def __init__(self, side: str | None, message: str) -> None:
        super().__init__(message)
        self.side = side


class _Process:
    def __init__(self, name: str, settings: Settings, phase: Callable[[str], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._phase, self._limit = phase, settings.time_limit
        self.info: dict[str, Any] = self._answer("ready", None)

    def row(self, *job: Any) -> dict[str, Any]:
        self._pipe.send(job)
        return self._answer("row", self._limit)

    def _answer(self, wanted: str, limit: float | None) -> dict[str, Any]:
        side = None
        while True:
            if not self._pipe.poll(limit):
                self.close()
                raise _Died(side, f"no end within {limit:g} s")
            try:
                kind, value = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise _Died(side, f"the process died (exit code {self._process.exitcode})") from None
            if kind == wanted:
                return value
            if kind == "error":
                self.close()
                raise _Died(side, value)
            side = value
            self._phase(value)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


class _Here:
    """What `_Process` does, in this one."""

    def __init__(self, name: str, settings: Settings, phase: Callable[[str], None]) -> None:
        self._measurement, self.info = _ready(name, settings, phase)
        self.row = self._measurement.row

    def close(self) -> None:
        del self._measurement, self.row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(
    name: str,
    lengths: list[int],
    settings: Settings,
    ready: Callable[[dict[str, Any]], None] = lambda info: None,
    phase: Callable[[str], None] = lambda side: None,
) -> Iterator[dict[str, Any]]:
    """Measure model `name` at each length, ascending; yields one row a length.

    A row has "tokens", "patched" and "original" (each with a "status": "ok", "out of memory", "crashed", "not run";
    with "median_ms", "min_ms", "max_ms", "ms", "peak_extra_bytes" and, by reason, the "original_calls" that a patched
    layer handed back when ok; with a "message" when not), "speedup" and
    "check" (see `compare`; None where nothing could be compared). After an original has failed, longer ones are not
    tried. `ready` gets the loaded model's facts; `phase` hears "patched", "original" or "check" before each run. Raises
    RuntimeError when the model cannot be loaded or patched.
    """
    process: _Process | _Here | None = None
    failed: dict[str, Any] | None = None if settings.original else {"status": "not run", "message": "not asked for"}
    proven: tuple[int, float] | None = None  # the longest original that ran, at most a segment, and its time
    announced = False
    try:
        for tokens in sorted(set(lengths)):
            outcomes: dict[str, dict[str, Any]] = {"original": failed} if failed else {}
            for side in (*SIDES, *settings.sides):
                if side not in settings.sides or not settings.runs(side, tokens):
                    outcomes.setdefault(side, {"status": "not run", "message": "not asked for"})
            row: dict[str, Any] = {}
            checks = settings.checks
            while wanted := [side for side in settings.sides if side not in outcomes]:
                if process is None:
                    try:
                        process = (_Process if settings.own_process else _Here)(name, settings, phase)
                    except _Died as death:
                        raise RuntimeError(f"{name}: {death}") from None
                    if not announced:
                        ready(process.info)
                        announced = True
                try:
                    row = process.row(tokens, wanted, _segments(tokens, proven), checks)
                    break
                except _Died as death:
                    process = None
                    if death.side == "check" and checks:
                        checks = False
                    else:
                        outcomes[death.side or "patched"] = {"status": "crashed", "message": str(death)}
            patched, original = (row.get(side) or outcomes[side] for side in SIDES)
            rest = {side: row.get(side) or outcomes[side] for side in settings.sides if side not in SIDES}
            rest |= {"floor": row["floor"]} if row.get("floor") else {}
            row = {"tokens": tokens, "patched": patched, "original": original, "check": row.get("check")} | rest
            if failed is None and original["status"] not in ("ok", "not run"):
                failed = {"status": "not run", "message": f"failed at {tokens:,} tokens: {original['status']}"}
            if original["status"] == "ok" and tokens <= LONGEST_SEGMENT:
                proven = (tokens, original["median_ms"])
            both = patched["status"] == original["status"] == "ok"
            row["speedup"] = original["median_ms"] / patched["median_ms"] if both else None
            yield row
    finally:
        if process is not None:
            process.close()


def _segments(tokens: int, proven: tuple[int, float] | None) -> tuple[str, int] | None:
    """What to compare with where the original cannot run in one piece: itself in pieces, or else the patched model."""
    if proven and proven[0] < tokens and proven[1] / 1e3 * tokens / proven[0] < SEGMENTED_SECONDS:
        return "original", proven[0]
    length = min(LONGEST_SEGMENT, -(-tokens // 8))
    return ("patched", length) if length < tokens else None
