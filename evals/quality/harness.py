"""Run lm-eval on a loaded model and keep what it measured of every document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.quality.compare import Aggregate, TaskResult, mean

LOCAL_TASKS = Path(__file__).parents[1] / "lm_tasks"
LOCAL = ("text", "cloze", *(f"recall_{length}k" for length in (1, 2, 4, 8, 16)))
LONG = ("fastmamba_recall_4k", "fastmamba_recall_8k", "fastmamba_recall_16k")
"""Tasks that run one document at a time: lm-eval sorts all prompts by length and pads each batch to its longest."""


class Harness:
    """lm-eval's tasks, evaluated as often as needed with the same documents, prompts and seeds."""

    def __init__(self, tasks: list[str], *, seed: int, limit: int | None, num_fewshot: int | None) -> None:
        from lm_eval.tasks import TaskManager

        self.names, self.seed, self.limit, self.num_fewshot = tasks, seed, limit, num_fewshot
        local = all(name.startswith("fastmamba_") for name in tasks)  # lm-eval takes 7 s to index its own
        self.manager = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=not local)
        unknown = [name for name in tasks if name not in self.manager.all_tasks and not Path(name).exists()]
        if unknown:
            raise ValueError(f"--tasks: lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: str,
        **settings: Any,
    ) -> dict[str, TaskResult]:
        """Evaluate a model as it is now; results by task."""
        results: dict[str, TaskResult] = {}
        for names, size in (
            ([n for n in self.names if n not in LONG], batch_size),
            ([n for n in self.names if n in LONG], "1"),
        ):
            if names:
                results |= self._run(names, model, tokenizer, batch_size=size, **settings)
        return results

    def _run(
        self,
        names: list[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: str,
        max_length: int | None,
        chat_template: bool,
    ) -> dict[str, TaskResult]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)  # type: ignore[arg-type]
        found: Any = simple_evaluate(
            model=lm,
            tasks=names,  # type: ignore[arg-type]
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=0,  # standard errors are our own
            log_samples=True,
            apply_chat_template=chat_template,
            task_manager=self.manager,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        return {name: _task_result(rows, found["configs"][name]) for name, rows in found["samples"].items()}


def _task_result(rows: list[dict[str, Any]], config: dict[str, Any]) -> TaskResult:
    rows = sorted(rows, key=lambda row: (row["filter"], row["doc_id"]))
    values: dict[str, list[Any]] = {}
    aggregates: dict[str, Aggregate] = {}
    for row in rows:
        for metric in row["metrics"]:
            key = f"{metric},{row['filter']}"
            values.setdefault(key, []).append(row[metric])
            if key not in aggregates:
                aggregates[key] = _aggregate(metric, config)
    loglikelihoods: list[float] = []
    choices: list[Any] = []
    kind = config["output_type"]
    for row in (row for row in rows if row["filter"] == rows[0]["filter"]):  # every filter repeats the documents
        answers = [response for request in row["resps"] for response in request]
        if kind == "generate_until":
            choices.append(answers)
        elif kind == "loglikelihood_rolling":
            loglikelihoods += [float(answer) for answer in answers]
        else:
            scores = [float(answer[0]) for answer in answers]
            loglikelihoods += scores
            choices.append(scores.index(max(scores)) if kind == "multiple_choice" else [bool(a[1]) for a in answers])
    return TaskResult(values, aggregates, loglikelihoods, choices)


def _aggregate(metric: str, config: dict[str, Any]) -> Aggregate:
    """How a task makes a score of a metric."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY, get_metric_aggregation

    chosen: Any = next((m.get("aggregation") for m in config.get("metric_list") or [] if m["metric"] == metric), None)
    if isinstance(chosen, str):
        chosen = AGGREGATION_REGISTRY[chosen]
    chosen = chosen or get_metric_aggregation(metric)
    return mean if chosen is None or getattr(chosen, "__name__", "") == "mean" else chosen
