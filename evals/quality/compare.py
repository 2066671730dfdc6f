"""Compare what lm-eval found of two models on the same documents, document by document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

Aggregate = Callable[[list[Any]], float]


@dataclass(frozen=True)
class TaskResult:
    """One model's answers to one task."""

    values: dict[str, list[Any]]
    """"metric,filter" -> what lm-eval measured of each document, in the order of documents."""
    aggregates: dict[str, Aggregate]
    """The same keys -> how lm-eval makes a score of it."""
    loglikelihoods: list[float] = field(default_factory=list)
    """Of every request, in the order of documents; empty for tasks that generate."""
    choices: list[Any] = field(default_factory=list)
    """Per document, what the model chose: an answer's index, whether it would have said so, or what it generated."""


@dataclass(frozen=True)
class Comparison:
    """A metric of a task, original against patched."""

    task: str
    metric: str
    documents: int
    original: float
    original_stderr: float
    patched: float
    patched_stderr: float
    difference: float
    """patched - original."""
    difference_stderr: float
    """Of the difference on the same documents: the noise that both share is not in it."""
    identical: float | None
    """Share of documents on which both chose the same; None where nothing is chosen."""
    loglikelihood: dict[str, float] | None
    """Absolute difference per request, in nats: median, p99, max."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(task: str, original: TaskResult, patched: TaskResult) -> list[Comparison]:
    """Compare two models on a task, one entry a metric."""
    if original.values.keys() != patched.values.keys():
        raise ValueError(f"task {task}: metrics differ, {sorted(original.values)} and {sorted(patched.values)}")
    identical = None
    if original.choices:
        same = [a == b for a, b in zip(original.choices, patched.choices, strict=True)]
        identical = sum(same) / len(same)
    loglikelihood = None
    if original.loglikelihoods:
        gap = np.abs(np.subtract(original.loglikelihoods, patched.loglikelihoods))
        loglikelihood = {
            "median": float(np.median(gap)),
            "p99": float(np.quantile(gap, 0.99)),
            "max": float(gap.max()),
        }
    found = []
    for key, before in original.values.items():
        after, aggregate = patched.values[key], original.aggregates[key]
        score, score_stderr = jackknife([before], aggregate)
        other, other_stderr = jackknife([after], aggregate)
        _, difference_stderr = jackknife([before, after], aggregate)
        found.append(
            Comparison(
                task=task,
                metric=key,
                documents=len(before),
                original=score,
                original_stderr=score_stderr,
                patched=other,
                patched_stderr=other_stderr,
                difference=other - score,
                difference_stderr=difference_stderr,
                identical=identical,
                loglikelihood=loglikelihood,
            )
        )
    return found


def jackknife(samples: Sequence[list[Any]], aggregate: Aggregate) -> tuple[float, float]:
    """A score, or with two samples the second one's minus the first one's, and its standard error.

    Leaving one document out at a time works for any aggregate, has no randomness, and for a mean gives the usual
    standard error. (lm-eval bootstraps what is not a mean.) Nan with fewer than two documents.
    """
    count = len(samples[0])
    if len(samples) == 2 and len(samples[1]) != count:
        raise ValueError(f"the two models answered {count} and {len(samples[1])} documents")

    def score(parts: Sequence[list[Any]]) -> float:
        scores = [float(aggregate(part)) for part in parts]
        return scores[-1] - scores[0] if len(scores) == 2 else scores[0]

    whole = score(samples)
    if count < 2:
        return whole, float("nan")
    if aggregate is mean:
        numbers = np.asarray(samples[-1], dtype=float) - (
            np.asarray(samples[0], dtype=float) if len(samples) == 2 else 0
        )
        return whole, float(numbers.std(ddof=1) / np.sqrt(count))
    without = np.array([score([part[:i] + part[i + 1 :] for part in samples]) for i in range(count)])
    return whole, float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum()))


def mean(values: list[Any]) -> float:
    return statistics.fmean(map(float, values))
