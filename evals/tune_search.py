"""A frugal search of launch configurations: measure a few, learn which look good, measure those, and so on.

The learner is a random forest that tells good configurations from others, after "Accelerating Autotuning in Helion with
Bayesian Optimization": candidates are ranked by the probability of being among the fastest, given everything that has
been measured so far, failures included. Nothing here knows of GPUs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier

Config = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What measuring one configuration gave."""

    config: Config
    us: float | None
    """GPU time in microseconds; None if it failed."""
    failure: str = ""
    """Why: it did not compile, ran out of shared memory, was wrong, hung, or ended its process."""

    @property
    def time(self) -> float:
        return math.inf if self.us is None else self.us


def key(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A configuration as something that can be looked up."""
    return tuple(sorted(config.items()))


@dataclass(frozen=True)
class Space:
    """Configurations to choose from: a start, choices for some of its fields, and which combinations make sense."""

    start: Config
    choices: Mapping[str, Sequence[Any]]
    valid: Callable[[Config], bool] = lambda config: True

    def __post_init__(self) -> None:
        unknown = [name for name in self.choices if name not in self.start]
        if unknown:
            raise ValueError(f"choices for {', '.join(unknown)}, which a configuration does not have")

    def __iter__(self) -> Iterator[Config]:
        """Every valid configuration, the start first."""
        yield self.start
        for values in itertools.product(*self.choices.values()):
            config = self.start | dict(zip(self.choices, values, strict=True))
            if config != self.start and self.valid(config):
                yield config

    def features(self, configs: Sequence[Config]) -> np.ndarray:
        """Numbers as their logarithm, since most are powers of two; anything else as its position in the choices."""

        def feature(name: str, value: Any) -> float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return math.log2(value) if value > 0 else -1.0
            return float(list(self.choices[name]).index(value)) if value in self.choices[name] else -1.0

        return np.array([[feature(name, config[name]) for name in self.choices] for config in configs])


@dataclass
class Search:
    """Proposes what to measure next."""

    space: Space
    batch: int = 8
    """Configurations in a round."""
    patience: int = 6
    """Rounds without a gain of 1% before it is over."""
    seed: int = 0
    results: dict[Any, Result] = field(default_factory=dict)
    """By configuration. Earlier results can be put in."""

    def run(self, measure: Callable[[list[Config]], Iterator[Result]], time_left: Callable[[], bool]) -> Result:
        """Measure until time is up, nothing is left, or nothing has been gained for a while.

        Returns:
            The best result.

        Raises:
            RuntimeError: nothing that was measured works.
        """
        draw = random.Random(self.seed)
        untried = [config for config in self.space if key(config) not in self.results]
        stale, before = 0, self.best_time
        while untried and time_left() and stale < self.patience:
            chosen = self.propose(untried, draw)
            for result in measure(chosen):
                self.results[key(result.config)] = result
            untried = [config for config in untried if key(config) not in self.results]
            gained = self.best_time < 0.99 * before
            stale, before = (0, self.best_time) if gained else (stale + 1, before)
        best = min(self.results.values(), key=lambda result: result.time, default=None)
        if best is None or best.us is None:
            reasons = {result.failure for result in self.results.values()}
            raise RuntimeError(f"no configuration works: {'; '.join(sorted(reasons)) or 'none was measured'}")
        return best

    @property
    def best_time(self) -> float:
        return min((result.time for result in self.results.values()), default=math.inf)

    def propose(self, untried: list[Config], draw: random.Random) -> list[Config]:
        """The next round, most promising first: half of it from around the best so far, a quarter from anywhere.

        The last quarter is drawn at random, which keeps the learner honest.
        """
        if self.space.start in untried:  # first of all, with what differs from it in one field
            near = [config for config in untried if _distance(config, self.space.start) == 1]
            return [self.space.start, *draw.sample(near, min(len(near), self.batch - 1))]
        promise = self.promise(untried)
        if promise is None:
            return draw.sample(untried, min(len(untried), self.batch))
        order = sorted(range(len(untried)), key=lambda i: (-promise[i], draw.random()))
        leaders = sorted(self.results.values(), key=lambda result: result.time)[:3]
        near = [i for i in order if any(_distance(untried[i], leader.config) == 1 for leader in leaders)]
        chosen = near[: self.batch // 2]
        chosen += [i for i in order if i not in chosen][: self.batch - self.batch // 4 - len(chosen)]
        rest = [i for i in order if i not in chosen]
        chosen += draw.sample(rest, min(len(rest), self.batch - len(chosen)))
        return [untried[i] for i in chosen]

    def promise(self, configs: list[Config]) -> np.ndarray | None:
        """Probability of each configuration being among the fastest quarter; None while nothing can be learnt."""
        known = list(self.results.values())
        times = np.array([result.time for result in known])
        worked = np.sort(times[np.isfinite(times)])
        if len(worked) < 2:
            return None
        threshold = worked[max(0, len(worked) // 4 - 1)]
        good = times <= threshold
        if good.all():
            return None
        # the faster, the more an example counts: the best is told from the merely good
        weights = np.where(good, (threshold / times) ** 4, 1.0)
        weights[good] *= (~good).sum() / weights[good].sum()
        forest = RandomForestClassifier(100, min_samples_leaf=2, max_features=1.0, random_state=self.seed)
        forest.fit(self.space.features([result.config for result in known]), good, weights)
        return forest.predict_proba(self.space.features(configs))[:, 1]


def _distance(one: Config, other: Config) -> int:
    """In how many fields two configurations differ."""
    return sum(one[name] != other[name] for name in one)
