"""Time `model.generate` of one model, in a process of its own: as loaded, patched, and patched with CUDA graphs.

A crash of one side (transformers' fast path at 256K tokens, say) ends the process; the rest is then measured in a fresh
one, without the side that crashed.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

import fastmamba
from evals import memory, prefill
from evals.gpu_timing import Timer

SIDES = ("graphs", "patched", "original")  # the original last: what it breaks must not cost the others' figures
CUDA_GRAPHS = {"graphs": "auto", "patched": "off"}
WARM_UP = 4


@dataclass(frozen=True)
class Settings:
    """What every model of a run is measured with."""

    device: str = "cuda"
    dtype: str = "bfloat16"
    layers: int | None = None
    new_tokens: int = 256
    slow_tokens: int | None = None
    """New tokens for the sides without graphs, whose pace shows in fewer; None for as many."""
    end_to_end: bool = False
    """In the first case every side generates `new_tokens`."""
    most_original: int | None = None
    """Tokens of a batch of prompts past which the original is not run; None for no end."""
    repeats: int = 1
    seed: int = 0
    sides: tuple[str, ...] = SIDES
    time_limit: float = 600.0


class _Clock:
    """A streamer: notes when the user has each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


# ---- inside the process -------------------------------------------------------------------------------------------


class Measurement:
    """One model. `tell` hears of each side before it runs, so that a death has an author, and of what came of it."""

    def __init__(self, settings: Settings, name: str, tell: Callable[[str, Any], None]) -> None:
        self.settings, self.tell = settings, tell
        self.device = torch.device(settings.device)
        self.model: Any = prefill.load(
            name, prefill.Settings(settings.device, settings.dtype, settings.layers, seed=settings.seed)
        )

    def facts(self) -> dict[str, Any]:
        """The model, and the machine's copy bandwidth (bytes read and written a second)."""
        facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}
        if self.device.type == "cuda":
            source = torch.randint(-128, 127, (1 << 30,), dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            ms = statistics.median(Timer(self.device, 5).events(lambda: target.copy_(source)))
            facts["copy_bytes_per_s"] = 2 * source.nbytes / ms * 1e3
        return facts

    def row(self, tokens: int, batch: int, sides: tuple[str, ...], whole: bool) -> dict[str, Any]:
        """Every side at one prompt length and batch size; with `whole`, all generate as many tokens."""
        generator = torch.Generator().manual_seed(self.settings.seed + tokens)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(3, vocabulary, (batch, tokens), generator=generator).to(self.device)
        row: dict[str, Any] = {"bytes_per_token": bytes_per_token(self.model, batch, tokens)}
        found: dict[str, torch.Tensor] = {}
        for side in sides:
            self.tell("phase", side)
            try:
                row[side], found[side] = self._side(side, ids, whole)
            except (MemoryError, RuntimeError) as error:
                if "out of memory" not in str(error):
                    raise
                row[side] = {"status": "out of memory", "message": str(error).splitlines()[0]}
            finally:
                fastmamba.unpatch(self.model)
            if "graphs" in found and "patched" in found:
                shared = min(found["graphs"].shape[1], found["patched"].shape[1])
                row["same_tokens"] = torch.equal(found["graphs"][:, :shared], found["patched"][:, :shared])
            self.tell("part", row)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return row

    def _side(self, side: str, ids: torch.Tensor, whole: bool) -> tuple[dict[str, Any], torch.Tensor]:
        count = self.settings.new_tokens
        if side != "graphs" and not whole:
            count = self.settings.slow_tokens or count
        report = None
        if side != "original":
            fastmamba.patch(self.model, cuda_graphs=CUDA_GRAPHS[side])
        self._generate(ids[:, : min(ids.shape[1], 1024)], WARM_UP)
        runs = []
        output = ids
        for _ in range(self.settings.repeats):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            with memory.Peak(self.device) as peak:
                output, first, steps = self._generate(ids, count)
            runs.append({"first_ms": first, "token_ms": statistics.median(steps), "total_ms": first + sum(steps)})
        # Not `statistics.median` of each: a run's figures belong together.
        best = sorted(runs, key=lambda run: run["total_ms"])[len(runs) // 2]
        calls: dict[str, int] = {}
        if side != "original":
            report = fastmamba.report(self.model)
            calls = next(filter(None, (layer.original_calls for layer in report.layers)), {})
        result: dict[str, Any] = {
            "status": "ok",
            "new_tokens": count,
            "runs": runs,
            **best,
            "peak_extra_bytes": peak.extra,
        }
        result |= {"tokens_per_s": ids.shape[0] / best["token_ms"] * 1e3, "original_calls": calls}
        if report is not None and report.graphs:
            result["graphs"] = [asdict(graph) for graph in report.graphs]
        return result, output

    def _generate(self, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, float, list[float]]:
        """The tokens, milliseconds until the user had the first one, and from each to the next."""
        clock = _Clock()
        start = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock if ids.shape[0] == 1 else None,
            stopping_criteria=None if ids.shape[0] == 1 else [lambda *_: _noted(clock, ids)],
        )
        times = clock.times[1:] if ids.shape[0] == 1 else clock.times  # a streamer is given the prompt first
        return output, (times[0] - start) * 1e3, [(b - a) * 1e3 for a, b in zip(times, times[1:], strict=False)]


def _noted(clock: _Clock, ids: torch.Tensor) -> torch.Tensor:
    """Streamers take one row: for a batch, a stopping criterion that never stops waits for the token."""
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    clock.put(ids)
    return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def bytes_per_token(model: Any, batch: int, tokens: int) -> dict[str, int]:
    """The fewest bytes a step of a batch has to move: weights read once, states read and written, keys and values read.

    Of experts, those that tokens choosing independently hit, on average. An embedding that is no head is not read.
    """
    config = model.config.get_text_config()
    weights = 0.0
    experts = {parameter for module in model.modules() if type(module).__name__.endswith("Experts")
               for parameter in module.parameters()}  # fmt: skip
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    for parameter in model.parameters():
        if parameter is model.get_input_embeddings().weight and not tied:
            continue
        share = 1.0
        if parameter in experts:
            chosen = config.num_experts_per_tok / config.num_local_experts
            share = 1 - (1 - chosen) ** batch
        weights += parameter.nbytes * share
    state = keys = 0
    for module in model.modules():
        if hasattr(module, "A_log"):
            size = module.num_heads * module.head_dim * module.ssm_state_size * 4
            size += module.conv_dim * module.conv_kernel_size * module.conv1d.weight.element_size()
            state += 2 * batch * size
        elif hasattr(module, "k_proj"):
            keys += batch * tokens * 2 * module.k_proj.out_features * module.k_proj.weight.element_size()
    return {"weights": int(weights), "states": state, "keys_and_values": keys}


def _serve(pipe: multiprocessing.connection.Connection, name: str, settings: Settings) -> None:
    """The process: load the model, answer jobs, end at None. Each message is (kind, value)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        measurement = Measurement(settings, name, lambda kind, value: pipe.send((kind, value)))
        pipe.send(("ready", measurement.facts()))
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
    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, settings), daemon=True)
        self._process.start()
        theirs.close()
        self._limit = settings.time_limit
        self.facts: dict[str, Any] = self._answer("ready")

    def row(self, *job: Any, heard: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        self._pipe.send(job)
        return self._answer("row", heard)

    def _answer(self, wanted: str, heard: Callable[[dict[str, Any]], None] = lambda part: None) -> dict[str, Any]:
        side = None
        while True:
            if not self._pipe.poll(self._limit):
                self.close()
                raise _Died(side, f"no end within {self._limit:g} s")
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
            if kind == "part":
                heard(value)
            else:
                side = value

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def measure(
    name: str,
    cases: list[tuple[int, int]],
    settings: Settings,
    ready: Callable[[dict[str, Any]], None] = lambda facts: None,
    heard: Callable[[dict[str, Any], str], None] = lambda row, side: None,
) -> Iterator[dict[str, Any]]:
    """Measure model `name` at each (prompt tokens, batch size); yields one row a case.

    `ready` is given what `Measurement.facts` found, `heard` a row each time that one of its sides is done, and which.

    A row has "tokens", "batch", "bytes_per_token", and for each side its outcome: "status" ("ok", "out of memory",
    "crashed", "not run"), "first_ms" (until the user has the first token), "token_ms" (median from one to the next),
    "total_ms", "tokens_per_s", "peak_extra_bytes"; and "same_tokens": whether graphs left the patched model's as they
    were.
    After a side has failed, it is not tried with more tokens. Raises RuntimeError when the model cannot be loaded.
    """
    process: _Process | None = None
    failed: dict[str, tuple[int, dict[str, Any]]] = {}
    announced = False
    try:
        for number, (tokens, batch) in enumerate(cases):
            row: dict[str, Any] = {"tokens": tokens, "batch": batch}
            if settings.most_original is not None and tokens * batch > settings.most_original:
                row["original"] = {"status": "not run", "message": f"more than {settings.most_original:,} tokens"}
            for side, (size, outcome) in failed.items():
                if tokens * batch >= size and side not in row:
                    row[side] = {"status": "not run", "message": f"{outcome['status']} at {size:,} tokens"}

            def add(part: dict[str, Any], row: dict[str, Any] = row) -> None:
                new = [side for side in settings.sides if side in part and side not in row]
                row |= part
                for side in new:
                    heard(row, side)

            while wanted := tuple(side for side in settings.sides if side not in row):
                try:
                    if process is None:
                        process = _Process(name, settings)
                        if not announced:
                            ready(process.facts)
                            announced = True
                    row |= process.row(tokens, batch, wanted, settings.end_to_end and number == 0, heard=add)
                    break
                except _Died as death:
                    if process is None:
                        raise RuntimeError(f"{name}: {death}") from None
                    process = None
                    row[death.side or wanted[-1]] = {"status": "crashed", "message": str(death)}
            for side in settings.sides:
                if row[side]["status"] not in ("ok", "not run"):
                    failed[side] = (tokens * batch, row[side])
            yield row
    finally:
        if process is not None:
            process.close()
