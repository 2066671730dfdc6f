"""From a search to the table that the library reads."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

from evals import tune
from evals.tune_measure import Worker
from evals.tune_search import Result, Search, Space, key
from fastmamba import tuned
from fastmamba.configs import SsdConfig, override, ssd_config

SHAPE = tuned.Shape("bfloat16", 1, 16384, 80, 64, 128)
with override("portable"):
    PLAIN = ssd_config(torch.device("cpu"), torch.bfloat16, 1, 16384, 80, 64, 128, None)
MEASURED = {"date": "2026-01-01", "command": "tune.py", "versions": {"triton": "3.6.0"}, "device": "left out"}


def entry(us: float, tokens: int = 16384, **changed: Any) -> dict[str, Any]:
    config = dataclasses.asdict(dataclasses.replace(PLAIN, **changed))
    return {"shape": vars(dataclasses.replace(SHAPE, tokens=tokens)), "config": config, "us": us}


def test_entries_replace_those_of_the_same_shape_and_variant(tmp_path):
    tune.write_table(tmp_path, "NVIDIA H200", [entry(5.0), entry(6.0, tokens=1024)], MEASURED)
    path = tune.write_table(tmp_path, "NVIDIA H200", [entry(4.0, warps=8), entry(3.0, variant="hopper")], MEASURED)
    assert path == tmp_path / "nvidia_h200.json" and list(tmp_path.iterdir()) == [path]
    found = tuned.load(path, "ssd", SsdConfig)
    assert sorted((one.shape.tokens, one.config.variant, one.us) for one in found) == [
        (1024, "portable", 6.0),
        (16384, "hopper", 3.0),
        (16384, "portable", 4.0),
    ]
    best = tuned.nearest(found, SHAPE, lambda config: config.variant == "portable")
    assert best is not None and best.config.warps == 8


def test_a_table_that_cannot_be_read_back_is_not_put_in_place(tmp_path):
    path = tune.write_table(tmp_path, "GPU", [entry(5.0)], MEASURED)
    before = path.read_text()
    with pytest.raises(ValueError, match="us must be a positive number"):
        tune.write_table(tmp_path, "GPU", [entry(-1.0)], MEASURED)
    assert path.read_text() == before


def test_what_is_tried_is_valid_and_begins_with_the_heuristic():
    space = tune.space(PLAIN, SHAPE)
    tried = list(space)
    assert tried[0] == dataclasses.asdict(PLAIN)
    assert len({key(config) for config in tried}) == len(tried) > 100
    for config in tried[1:]:
        SsdConfig(**config)
        assert config["segments"] == 1 or 16384 / config["segments"] >= 2 * config["chunk"]
        assert config["block_p"] <= 64
    one_token = tune.space(PLAIN, dataclasses.replace(SHAPE, tokens=1))
    assert all(config["segments"] == 1 for config in list(one_token)[1:])


def test_nothing_is_tried_that_a_kernel_does_not_have():
    wide = dataclasses.replace(PLAIN, variant="hopper", chunk=64, block_n=256, stages=2)
    assert {config["stages"] for config in tune.space(wide, dataclasses.replace(SHAPE, state=256))} == {2}
    narrow = dataclasses.replace(wide, block_n=128, stages=3)
    assert {config["stages"] for config in tune.space(narrow, SHAPE)} == {2, 3, 4}


WORKER = """
import itertools, json, sys
times = {1: itertools.repeat(10.0), 2: itertools.chain([9.0], itertools.repeat(12.0)), 3: itertools.repeat(8.0)}
sys.stdin.readline()
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    a = json.loads(line)["time"]["a"]
    print(json.dumps({"us": next(times[a])} if a in times else {"failure": "gone"}), flush=True)
"""


def confirmed(*results: Result) -> tuple[Result, Result]:
    search = Search(Space({"a": 1}, {"a": [1, 2, 3, 4]}), results={key(result.config): result for result in results})
    worker = Worker([sys.executable, "-S", "-c", WORKER], {})
    try:
        return tune.confirm(search, worker, 10.0)
    finally:
        worker.stop()


def test_the_fastest_are_measured_again():
    # 2 was lucky the first time, 4 does not run again
    best, before = confirmed(Result({"a": 1}, 10.0), Result({"a": 2}, 9.0), Result({"a": 4}, 1.0))
    assert best.config == {"a": 1} and before.us == 10.0
    best, before = confirmed(Result({"a": 1}, 10.0), Result({"a": 2}, 9.0), Result({"a": 3}, 9.5))
    assert best == Result({"a": 3}, 8.0) and before.us == 10.0


def test_a_heuristic_that_fails_is_no_obstacle():
    best, before = confirmed(Result({"a": 1}, None, "OutOfResources"), Result({"a": 3}, 8.0))
    assert best.us == 8.0 and before.us is None
    with pytest.raises(RuntimeError, match="do not run a second time"):
        confirmed(Result({"a": 4}, 8.0))
