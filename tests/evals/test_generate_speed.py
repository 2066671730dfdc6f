"""The generation eval: a run on the CPU, and what it makes of failures."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from evals import generate, generate_report, generate_speed, shapes


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in shapes with a small vocabulary, whose weights and logits would take most of the time."""
    own = shapes.config_for

    def config_for(name: str, layers: int | None = None) -> Any:
        config = own(name, layers)
        config.vocab_size = 512
        return config

    monkeypatch.setattr(shapes, "config_for", config_for)


@pytest.mark.usefixtures("forked", "few_words")
def test_run(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model granite-4.0-h-350m --layers 2 --tokens 8,16 --batch 1,2 --new-tokens 4 --device cpu"
    assert generate_speed.main([*arguments.split(), "--dtype", "float32", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "generate_speed.json").read_text())
    rows = record["models"][0]["rows"]
    assert [(row["tokens"], row["batch"]) for row in rows] == [(8, 1), (16, 1), (8, 2)]
    for row in rows:
        assert row["same_tokens"] is True
        for side in generate.SIDES:
            assert row[side]["status"] == "ok" and row[side]["token_ms"] > 0
    assert record["passed"] is True and (tmp_path / "generate_speed.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "x in all" in printed
    assert printed.count("granite-4.0-h-350m") == 2 * 9  # each side when it is done, and all of them in the table


@pytest.mark.usefixtures("forked", "few_words")
def test_short_runs_of_the_original(tmp_path: pathlib.Path) -> None:
    """It generates all tokens in the first case alone, and long prompts are not its affair."""
    arguments = "--model mamba2-130m --layers 2 --tokens 8,16,32 --new-tokens 4 --slow-tokens 2 --device cpu"
    options = "--dtype float32 --end-to-end --most-original 16 --sides graphs,original"
    assert generate_speed.main([*arguments.split(), *options.split(), "--output", str(tmp_path)]) == 0
    first, second, third = json.loads((tmp_path / "generate_speed.json").read_text())["models"][0]["rows"]
    assert [row["original"].get("new_tokens") for row in (first, second, third)] == [4, 2, None]
    assert third["original"]["status"] == "not run"
    assert generate_report.speedup(first, "graphs", "total_ms") and not generate_report.speedup(
        second, "graphs", "total_ms"
    )


def test_bytes_per_token() -> None:
    """By hand: weights once, the head being the embedding; float32 states in and out; keys and values of the prompt."""
    import torch

    model = shapes.build("granite-4.0-h-tiny", 2, torch.bfloat16, torch.device("meta"), 0)
    total = sum(parameter.nbytes for parameter in model.parameters())
    experts = 2 * 64 * (2 * 512 * 1536 + 1536 * 512) * 2
    one = generate.bytes_per_token(model, 1, 1000)
    assert one["weights"] == pytest.approx(total - experts + experts * 6 / 64, rel=1e-6)
    assert one["states"] == 2 * (48 * 64 * 128 * 4 + (48 * 64 + 256) * 4 * 2)
    assert one["keys_and_values"] == 1000 * 2 * 4 * 128 * 2
    assert generate.bytes_per_token(model, 1000, 1)["weights"] == pytest.approx(total, rel=1e-3)


def ok(ms: float, tokens: int = 4) -> dict[str, Any]:
    extra = {"original_calls": {}, "peak_extra_bytes": None, "tokens_per_s": 1e3 / ms, "first_ms": 1.0}
    return {"status": "ok", "token_ms": ms, "total_ms": 4 * ms, "new_tokens": tokens, **extra}


def test_a_side_that_died() -> None:
    row = {"tokens": 8, "batch": 1, "original": {"status": "crashed"}, "patched": ok(4.0), "graphs": ok(2.0)}
    assert generate_speed.judge("m", row) == []
    assert generate_report.speedup(row, "graphs") is None
    assert "crashed" in generate_report.text([{"name": "m", "rows": [row]}])
    row["original"] = ok(20.0, tokens=2)
    assert generate_report.speedup(row, "graphs") == 10.0
    assert generate_report.speedup(row, "graphs", "total_ms") is None, "of fewer tokens"
    row["graphs"] = {"status": "out of memory", "message": "too much"}
    row["same_tokens"] = False
    assert [fault.split(": ", 1)[1] for fault in generate_speed.judge("m", row)] == [
        "graphs out of memory: too much",
        "graphs changed the tokens",
    ]
