"""Rows of the synthetic task: facts `<keyNN><valueMM>` strewn in text, each asked for later as `<ask><keyNN>`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEYS = VALUES = 64
IGNORED, TEXT, ANSWER = 0, 1, 2
"""What a target is: not to be learned (facts are random), a token of text, a value that was asked for."""


@dataclass(frozen=True)
class Ids:
    """Token ids of the task."""

    ask: int
    key: int
    """The first of KEYS."""
    value: int
    """The first of VALUES."""


def plain(rng: np.random.Generator, text: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`length` + 1 tokens of text, and the kinds of its targets (the tokens from the second on)."""
    start = rng.integers(len(text))
    row = np.take(text, np.arange(start, start + length + 1), mode="wrap").astype(np.int64)
    return row, np.full(length, TEXT, dtype=np.int64)


def dense(rng: np.random.Generator, ids: Ids, length: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` facts and then nothing but questions."""
    facts = int(rng.integers(1, most + 1))
    asks = (length + 1 - 2 * facts) // 3
    return _row(rng, np.empty(0, np.int64), ids, length, np.zeros(facts, int), np.zeros(asks, int))


def strewn(
    rng: np.random.Generator, text: np.ndarray, ids: Ids, length: int, asks: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` facts, near the start or anywhere in the first half; questions anywhere after the first fact."""
    facts = int(rng.integers(1, most + 1))
    left = length + 1 - 2 * facts - 3 * asks
    window, _ = plain(rng, text, left - 1)
    early = rng.random() < 0.5
    made = np.sort(rng.integers(0, min(256, left // 4) if early else left // 2, facts))
    asked = np.sort(rng.integers(made[0] + 1, left + 1, asks))
    return _row(rng, window, ids, length, made, asked)


def distant(
    rng: np.random.Generator, text: np.ndarray, ids: Ids, length: int, facts: int = 24
) -> tuple[np.ndarray, np.ndarray]:
    """What is evaluated: all facts in the first 256 tokens of text, each asked once at the end."""
    left = length + 1 - 5 * facts
    window, _ = plain(rng, text, left - 1)
    made = np.sort(rng.integers(0, min(256, left // 4), facts))
    return _row(rng, window, ids, length, made, np.full(facts, left), once=True)


def _row(
    rng: np.random.Generator,
    text: np.ndarray,
    ids: Ids,
    length: int,
    made: np.ndarray,
    asked: np.ndarray,
    once: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Insert a fact before each of text's positions `made`, and a question before each of `asked`, both ascending."""
    keys = rng.permutation(KEYS)[: len(made)]
    values = rng.integers(0, VALUES, len(made))
    known = np.searchsorted(made, asked, side="right" if len(text) == 0 or once else "left")
    chosen = rng.permutation(len(made)) if once else (rng.random(len(asked)) * known).astype(int)
    pieces, kinds = [], []
    done = 0

    def add(tokens: np.ndarray | tuple[int, ...], kind: tuple[int, ...] | np.ndarray) -> None:
        pieces.append(np.asarray(tokens, dtype=np.int64))
        kinds.append(np.asarray(kind, dtype=np.int64))

    events = [(cut, 0, i) for i, cut in enumerate(made)] + [(cut, 1, i) for i, cut in enumerate(asked)]
    for cut, question, i in sorted(events):
        add(text[done:cut], np.full(cut - done, TEXT))
        done = cut
        if question:
            fact = chosen[i]
            add((ids.ask, ids.key + keys[fact], ids.value + values[fact]), (IGNORED, IGNORED, ANSWER))
        else:
            add((ids.key + keys[i], ids.value + values[i]), (IGNORED, IGNORED))
    add(text[done:], np.full(len(text) - done, TEXT))
    row, kind = np.concatenate(pieces), np.concatenate(kinds)
    if len(row) < length + 1:  # dense rows: questions come in threes
        row = np.concatenate([row, np.full(length + 1 - len(row), ids.ask)])
        kind = np.concatenate([kind, np.full(length + 1 - len(kind), IGNORED)])
    return row, kind[1:]
