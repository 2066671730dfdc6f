"""The search for launch configurations, on made-up GPUs."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time

import pytest

from evals.tune_measure import Measurer, Worker
from evals.tune_search import Result, Search, Space, key

CHOICES = {
    "chunk": [16, 32, 64, 128],
    "segments": [1, 2, 4, 8, 16, 32, 64],
    "warps": [1, 2, 4, 8],
    "stages": [1, 2, 3, 4],
}
START = {"variant": "portable", "chunk": 16, "segments": 1, "warps": 1, "stages": 1}
SPACE = Space(START, CHOICES)


def model(config: dict) -> float | None:
    """A GPU on which the best is chunk 64, 16 segments, 4 warps, 2 stages, at 100 us."""
    if config["chunk"] * config["stages"] > 256:
        return None  # out of shared memory
    off = [math.log2(config[name] / best) for name, best in (("chunk", 64), ("segments", 16), ("warps", 4))]
    return 100 * (1 + 0.3 * sum(x * x for x in off) + 0.1 * abs(config["stages"] - 2) + 0.2 * abs(off[0] * off[2]))


def measured(configs):
    for config in configs:
        us = model(config)
        yield Result(config, us, "" if us else "OutOfResources")


def test_the_space():
    small = Space({"a": 1, "b": 1}, {"a": [1, 2], "b": [1, 2]}, lambda config: config != {"a": 2, "b": 2})
    assert list(small) == [{"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}]
    with pytest.raises(ValueError, match="choices for c, which"):
        Space({"a": 1}, {"c": [1]})


@pytest.mark.parametrize("seed", range(3))
def test_near_the_best_after_a_tenth_of_the_space(seed):
    everything = sorted(us for config in SPACE if (us := model(config)))
    search, budget = Search(SPACE, seed=seed, patience=100), itertools.count()
    best = search.run(measured, lambda: next(budget) < 6)
    assert len(search.results) <= 48 < 0.11 * sum(1 for _ in SPACE)
    assert best.us is not None and best.us <= everything[4]


def test_it_learns_more_than_chance_does():
    """After the same number of measurements the search is where random choice would be with many more."""
    found = []
    for seed in range(3):
        search, budget = Search(SPACE, seed=seed, patience=100), itertools.count()
        found.append(search.run(measured, lambda: next(budget) < 5).time)  # noqa: B023
    times = sorted(us if (us := model(config)) else math.inf for config in SPACE)
    # of 40 drawn at random the best is on average among the fastest 11 of 448
    assert sum(found) / 3 < times[5]


def test_it_ends_without_gain_and_without_more_to_try():
    flat = Search(SPACE, patience=3)
    flat.run(lambda configs: (Result(config, 5.0) for config in configs), lambda: True)
    assert len(flat.results) <= 8 * 5
    tiny = Search(Space({"a": 1}, {"a": [1, 2, 3]}), patience=100)
    assert tiny.run(lambda configs: (Result(config, config["a"]) for config in configs), lambda: True).us == 1
    assert len(tiny.results) == 3


def test_nothing_that_works_says_why():
    search = Search(Space({"a": 1}, {"a": [1, 2]}))
    with pytest.raises(RuntimeError, match="no configuration works: crashed; too slow"):
        search.run(
            lambda configs: (Result(c, None, "crashed" if c["a"] == 1 else "too slow") for c in configs), lambda: True
        )


WORKER = """
import json, os, sys, time
first = json.loads(sys.stdin.readline())
if first.get("broken"):
    sys.exit(3)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    config = request.get("check") or request["time"]
    if config["a"] == 13:
        os.abort()
    if config["a"] == 14 and "time" in request:
        time.sleep(60)
    reply = {"us": 10.0 * config["a"], "pid": os.getpid()} if "time" in request else {}
    if config["a"] == 15:
        reply = {"failure": "OutOfResources: shared memory"}
    if config["a"] == 16:
        reply = {"failure": "RuntimeError: illegal memory access", "last": True}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def measurer(tmp_path):
    made = []

    def make(workers: int = 2, first: dict | None = None, **about) -> Measurer:
        command = [sys.executable, "-S", "-c", WORKER]
        some = [Worker(command, first or {}) for _ in range(workers)]
        made.append(Measurer(some, tmp_path / "log" / "tune.jsonl", {"shape": 1} | about, timeout=1.0))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def test_ill_configurations_are_survived_and_logged(measurer):
    one = measurer()
    began = time.monotonic()
    results = list(one([{"a": a} for a in (1, 13, 14, 15, 16, 2)]))
    assert time.monotonic() - began < 20
    assert [(r.us, r.failure[:20]) for r in results[:1] + results[-1:]] == [(10.0, ""), (20.0, "")]
    failures = {result.config["a"]: result.failure for result in results if result.us is None}
    assert failures[13].startswith("ended its process, exit status -6")
    assert failures[14] == "took more than 1 s"
    assert failures[15] == "OutOfResources: shared memory"
    assert failures[16] == "RuntimeError: illegal memory access"
    assert [result.config["a"] for result in one.earlier()] == [1, 13, 14, 15, 16, 2]


def test_a_log_counts_for_the_same_only(measurer):
    one = measurer(versions={"triton": "3.6.0"})
    list(one([{"a": 1}, {"a": 2}]))
    with one.log.open("a") as log:
        log.write('{"shape": 1, "versions": {"triton"')  # broken off
    assert [result.us for result in one.earlier()] == [10.0, 20.0]
    assert measurer(versions={"triton": "3.7.0"}).earlier() == []


def test_a_worker_that_cannot_start_is_an_error(measurer):
    with pytest.raises(RuntimeError, match="does not start: ended its process, exit status 3"):
        list(measurer(first={"broken": True})([{"a": 1}]))


def test_a_search_over_processes(measurer):
    search = Search(Space({"a": 16}, {"a": [13, 15, 16, 4, 3, 2]}))
    best = search.run(measurer(workers=3), lambda: True)
    assert best.config == {"a": 2} and best.us == 20.0
    assert search.results[key({"a": 13})].us is None
    json.dumps([vars(result) for result in search.results.values()])
