"""Perplexity of an interpolated Kneser-Ney model on the tokens that the small models were trained and held out on.

    python -m evals.models.ngram DATA --order 3

With modified discounts (Chen and Goodman, 1999, "An empirical study of smoothing techniques for language modeling"):
three per order, estimated from the counts of counts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

Gram = tuple[int, ...]


class KneserNey:
    """Interpolated modified Kneser-Ney over token ids below `vocabulary`."""

    def __init__(self, tokens: list[int], order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        counts: Counter[Gram] = Counter(zip(*(tokens[i:] for i in range(order)), strict=False))
        # Per order: what follows a context, as (total, {token: count}, discounts, [how many with count 1, 2, 3+]).
        self.tables: list[tuple[list[float], dict[Gram, tuple[int, dict[int, int], list[int]]]]] = []
        for size in range(order, 0, -1):
            self.tables.append((_discounts(counts), _table(counts)))
            # Below the highest order a gram counts as often as there are different tokens before it.
            counts = Counter(gram[1:] for gram in counts) if size > 1 else counts

    def probability(self, context: Gram, token: int) -> float:
        p = 1.0 / self.vocabulary
        for size in range(1, self.order + 1):
            discounts, table = self.tables[self.order - size]
            entry = table.get(context[len(context) - size + 1 :])
            if entry is None:
                break
            total, following, classes = entry
            count = following.get(token, 0)
            back_off = sum(d * n for d, n in zip(discounts, classes, strict=True)) / total
            p = max(count - (discounts[min(count, 3) - 1] if count else 0.0), 0.0) / total + back_off * p
        return p


def _discounts(counts: Counter[Gram]) -> list[float]:
    n = Counter(min(count, 5) for count in counts.values())
    y = n[1] / max(n[1] + 2 * n[2], 1)
    return [max(0.0, k - (k + 1) * y * n[k + 1] / max(n[k], 1)) for k in (1, 2, 3)]


def _table(counts: Counter[Gram]) -> dict[Gram, tuple[int, dict[int, int], list[int]]]:
    following: defaultdict[Gram, dict[int, int]] = defaultdict(dict)
    for gram, count in counts.items():
        following[gram[:-1]][gram[-1]] = count
    return {
        context: (sum(seen.values()), seen, [sum(min(c, 3) == k for c in seen.values()) for k in (1, 2, 3)])
        for context, seen in following.items()
    }


def loss(model: KneserNey, tokens: list[int], length: int = 1024) -> float:
    """Mean nats a token, over the rows of `length` tokens that the small models are evaluated on."""
    stop = (len(tokens) - 1) // length * length
    width = model.order - 1
    padded = [0] * width + tokens
    total = sum(np.log(model.probability(tuple(padded[i + 1 : i + 1 + width]), tokens[i + 1])) for i in range(stop))
    return -float(total) / stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="the folder that evals.models.text made")
    parser.add_argument("--order", type=int, nargs="+", default=[2, 3, 4, 5])
    arguments = parser.parse_args()
    train, held = (
        np.fromfile(arguments.data / f"{name}.u16", dtype=np.uint16).tolist() for name in ("train", "held_out")
    )
    # The 129 tokens of the recall task occur in no text: the n-gram model need not reserve anything for them.
    for order in arguments.order:
        nats = loss(KneserNey(train, order, 2048 - 129), held)
        print(
            json.dumps({"order": order, "held out, nats a token": nats, "perplexity": float(np.exp(nats))}), flush=True
        )


if __name__ == "__main__":
    main()
