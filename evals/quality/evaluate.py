"""Everything the report says about one model: the distance of its predictions on a text, and lm-eval's tasks."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastmamba
from evals.quality import rules
from evals.quality.compare import compare
from evals.quality.drift import Advance, Reference, work

MODELS = Path(__file__).parents[1] / "models"
SMALL = ("mamba2", "granite")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Variant = tuple[str, dict[str, Any]]
"""A dtype's name, and options of patch()."""


class Evaluation:
    """One model, original and in every patched variant.

    Attributes:
        found: what goes into the report.
        broken: what breaks parity, in words.

    Raises:
        ValueError: --tasks names one that lm-eval does not know.
        OSError: transformers cannot find the model.
    """

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device, console: Console) -> None:
        from transformers import AutoTokenizer

        from evals.quality.harness import LOCAL, Harness

        self.small = name in SMALL
        self.source = str(MODELS / name) if self.small else name
        self.name = Path(name.rstrip("/")).name if Path(self.source).is_dir() else name
        self.options, self.device, self.console = options, device, console
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.source)
        self.broken: list[str] = []
        self.found: dict[str, Any] = {"name": self.name, "tokens": options.tokens, "text": [], "tasks": []}
        self.halves: dict[tuple[str, str], dict[str, Any]] = {}
        """What the original loses in half precision, by (dtype, way)."""
        self.reference: Reference | None = None
        self.harness: Harness | None = None
        tasks = options.tasks or [f"fastmamba_{task}" for task in (LOCAL if self.small else LOCAL[:2])]
        if tasks != ["none"]:
            self.found["lm_eval"] = importlib.metadata.version("lm_eval")
            self.harness = Harness(tasks, seed=options.seed, limit=options.limit, num_fewshot=options.num_fewshot)

    def run(self, variants: list[Variant], save: Callable[[], None]) -> None:
        """Measure all variants; `save` is called after each."""
        began = time.perf_counter()
        options = self.options
        if options.tokens:
            model = self._load("float32")
            ids = self._text().to(self.device)
            with self._bar("original float32", work(ids.shape[1], ("one call",))) as advance:
                self.reference = Reference(model, ids, options.original_tokens, advance)
            del model
        for dtype in options.dtype:
            model = self._load(dtype)
            self._original_text(dtype, model)
            before = self._tasks(f"original {dtype}", model)
            for label, patch in ((label_of(*each), each[1]) for each in variants if each[0] == dtype):
                with fastmamba.patched(model, **patch) as patched:
                    self._patched_text(label, dtype, model)
                    self._compare(label, dtype, before, self._tasks(label, model))
                    self.found["layers"] = str(patched)
                self.found["seconds"] = round(time.perf_counter() - began, 1)
                save()
            del model
            gc.collect()
        self.reference = None  # its logits are large

    def _original_text(self, dtype: str, model: Any) -> None:
        """What the original loses on the text in half precision; in bfloat16 where `dtype` is float32."""
        if self.reference is None:
            return
        yard = "bfloat16" if dtype == "float32" else dtype
        whole = self.reference.tokens <= self.options.original_tokens
        ways = ("one call",) if dtype == "float32" else ("one call", "pieces") if whole else ("pieces",)
        original = self._load(yard) if yard != dtype else model
        run = f"original {yard}"
        with self._bar(run, work(self.reference.tokens, ways)) as advance:
            for way, drift in self.reference.drift(original, ways, original=True, advance=advance):
                summary = drift.summary(self.reference.tokens)
                self.halves[dtype, way] = summary
                self.halves.setdefault((dtype, "one call"), summary)
                if (run, way) not in {(entry["run"], entry["way"]) for entry in self.found["text"]}:
                    self.found["text"].append({"run": run, "way": way, "bound": None, **summary})

    def _patched_text(self, label: str, dtype: str, model: Any) -> None:
        if self.reference is None:
            return
        with self._bar(label, work(self.reference.tokens)) as advance:
            for way, drift in self.reference.drift(model, advance=advance):
                half = self.halves.get((dtype, way), self.halves[dtype, "one call"])
                summary = drift.summary(self.reference.tokens)
                lines = rules.broken_drift(f"{self.name}, {label}, {way}", summary, half, dtype)
                self.broken += lines
                bound = rules.kl_bound(half["kl"], dtype)
                self.found["text"].append({"run": label, "way": way, "bound": bound, "broken": bool(lines), **summary})

    def _tasks(self, label: str, model: Any) -> dict[str, Any]:
        """lm-eval's results by task; none where none are wanted."""
        if self.harness is None:
            return {}
        began = time.perf_counter()
        found = self.harness.run(
            model,
            self.tokenizer,
            batch_size=self.options.batch_size,
            max_length=self.options.max_length or (32768 if self.small else None),
            chat_template=self.options.apply_chat_template,
        )
        self._say("lm-eval", label, began)
        return found

    def _compare(self, label: str, dtype: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        half = self.halves.get((dtype, "one call"))
        kl = (rules.kl_bound(half["kl"], dtype) if half else None) or rules.USUAL[dtype]
        for task, results in before.items():
            for comparison in compare(task, results, after[task]):
                lines = rules.broken_task(f"{self.name}, {label}", comparison, kl)
                self.broken += lines
                self.found["tasks"].append({"run": label, "broken": bool(lines), **comparison.to_dict()})

    def _load(self, dtype: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.source, dtype=DTYPES[dtype]).to(self.device).eval()

    def _text(self) -> torch.Tensor:
        """Token ids (1, T) of the running text, repeated where it is too short."""
        if self.options.text is not None:
            text = self.options.text.read_text(encoding="utf-8")
        else:
            parts = json.loads((MODELS.parent / "lm_tasks/held_out.json").read_text(encoding="utf-8"))
            text = "\n\n".join(parts.values())
        ids = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids
        if not ids.numel():
            raise ValueError(f"--text: no tokens in {self.options.text}")
        return ids.repeat(1, -(-self.options.tokens // ids.shape[1]))[:, : self.options.tokens]

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        """A progress bar over tokens of text; a line when it is done."""
        began = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(f"{self.name}: text, {label}", total=total)
            yield lambda tokens: progress.advance(task, tokens)
        self._say("text", label, began)

    def _say(self, what: str, label: str, began: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the original's needs are large: leave them to whatever else the GPU runs
        self.console.print(f"{self.name}: {what}, {label}: {time.perf_counter() - began:.1f} s", highlight=False)


def label_of(dtype: str, patch: dict[str, Any]) -> str:
    """What the report calls a patched run: what is not as usual follows the dtype."""
    extra = [
        f"{str(value).removeprefix('torch.')} states" if name == "state_dtype" else str(value)
        for name, value in patch.items()
        if (name, value) not in (("scope", "block"), ("backend", "auto"), ("precision", "exact"))
    ]
    return ", ".join([f"patched {dtype}", *extra])
