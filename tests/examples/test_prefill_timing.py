"""The demo script: what it accepts, that it measures and compares, and that a wrong patched model fails it."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, Mamba2Config

import fastmamba
from evals import prefill, shapes
from examples import prefill_timing

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "tokens": 8,
    "patched": {"status": "ok", "original_calls": {}},
    "original": {"status": "out of memory", "message": ""},
    "check": None,
}


def small_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "mamba2":
        config = Mamba2Config(
            hidden_size=32, num_heads=4, head_dim=16, state_size=16, n_groups=1, num_hidden_layers=2, vocab_size=61
        )
    else:
        config = GraniteMoeHybridConfig(
            hidden_size=32,
            num_hidden_layers=2,
            layer_types=["mamba", "attention"],
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=0,
            shared_intermediate_size=32,
            vocab_size=61,
        )
    model = AutoModelForCausalLM.from_config(config).eval()
    shapes.trained_looking_mixers(model)
    return model


@pytest.mark.parametrize(("text", "tokens"), [("512", 512), ("1K", 1024), ("256k", 262144), (" 2K ", 2048)])
def test_token_counts(text: str, tokens: int) -> None:
    assert prefill_timing.token_count(text) == tokens


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "1K,many"], "--tokens"),
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "1K,,2K"], "--tokens"),
        (["--repeats", "0"], "--repeats"),
        (["--layers", "-1"], "--layers"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device"),
        (["--scope", "all"], "--scope"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        prefill_timing.parse(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", shapes.NAMES)
def test_shapes_are_consistent(name: str) -> None:
    config = shapes.config_for(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    published = {
        "mamba2-130m": 130,
        "mamba2-370m": 370,
        "mamba2-780m": 780,
        "mamba2-1.3b": 1340,
        "mamba2-2.7b": 2700,
        "granite-4.0-h-350m": 340,
        "granite-4.0-h-1b": 1460,
        "granite-4.0-h-micro": 3190,
        "granite-4.0-h-tiny": 6940,
        "granite-4.0-h-small": 32200,
    }
    assert millions == pytest.approx(published[name], rel=0.03)


def test_a_cut_hybrid_stays_a_hybrid() -> None:
    assert [kind == "full_attention" for kind in shapes.config_for("granite-4.0-h-micro", 3).layer_types] == [0, 0, 1]
    assert shapes.config_for("mamba2-2.7b", 3).num_hidden_layers == 3
    with pytest.raises(ValueError, match="layers"):
        shapes.config_for("mamba2-2.7b", 0)
    with pytest.raises(ValueError, match="mamba2-9b"):
        shapes.config_for("mamba2-9b")


@pytest.mark.parametrize("kind", ["mamba2", "granite"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_both_sides_and_a_comparison(kind: str, dtype: str) -> None:
    model = small_model(kind).to(getattr(torch, dtype))
    phases: list[str] = []
    row = prefill.Measurement(model, prefill.Settings(dtype=dtype, repeats=2), phases.append).row(
        70, list(prefill.SIDES), None, True
    )
    assert row["patched"]["status"] == row["original"]["status"] == "ok"
    assert row["patched"]["original_calls"] == {}
    assert len(row["patched"]["ms"]) == len(row["original"]["ms"]) == 2
    assert row["check"]["passed"], row["check"]
    assert ("patched_error" in row["check"]) == (dtype == "bfloat16")  # float32 is its own reference
    if dtype == "bfloat16":
        assert 0 < row["check"]["patched_hidden_error"] < 2 * row["check"]["original_hidden_error"]
    assert phases[0] == "patched"
    assert prefill_timing.judge("m", row) == []
    assert fastmamba.unpatch(model) == 0, "left as it was found"


@pytest.mark.parametrize("what", ["outputs", "state"])
def test_a_wrong_patched_model_fails_the_comparison(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mamba2")
    mixer = model.backbone.layers[0].mixer
    patch, unpatch = fastmamba.patch, fastmamba.unpatch
    hooks: list[RemovableHandle] = []

    def spoil(module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        if what == "outputs":
            return output * 1.01
        if output.shape[1] > 1:
            kwargs["cache_params"].layers[0].recurrent_states[0].mul_(1.5)
        return output

    def wrong(model: torch.nn.Module, **options: str) -> None:
        patch(model, **options)
        hooks.append(mixer.register_forward_hook(spoil, with_kwargs=True))

    def clean(model: torch.nn.Module) -> None:
        unpatch(model)
        hooks.pop().remove()

    monkeypatch.setattr(fastmamba, "patch", wrong)
    monkeypatch.setattr(fastmamba, "unpatch", clean)
    measurement = prefill.Measurement(model, prefill.Settings(repeats=1), lambda side: None)
    row = measurement.row(70, list(prefill.SIDES), None, True)
    assert not row["check"]["passed"]
    assert "differ" in prefill_timing.judge("m", row)[0]


def test_comparison_rejects_what_is_not_finite() -> None:
    logits = torch.randn(1, 3, 7)
    assert prefill.compare(logits, logits, None, 1e-4)["passed"]
    assert not prefill.compare(torch.full_like(logits, float("nan")), logits, None, 1e-4)["passed"]
    assert not prefill.compare(logits, logits * 1.01, logits * 1.01, 1e-4)["passed"]


def test_prefill_in_segments_stands_in_for_an_original_that_cannot_run() -> None:
    model = small_model("granite")
    measurement = prefill.Measurement(model, prefill.Settings(repeats=1), lambda side: None)
    for side in prefill.SIDES:
        check = measurement.row(70, ["patched"], (side, 16), True)["check"]
        assert check["passed"], check
        assert side in check["against"]
    assert measurement.row(70, ["patched"], None, True)["check"] is None


def test_an_original_that_is_itself_wrong_does_not_fail_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mamba2")
    measurement = prefill.Measurement(model, prefill.Settings(repeats=1), lambda side: None)
    real = prefill.checked_logits

    def wrong_when_long(model: torch.nn.Module, ids: torch.Tensor, segment: int) -> torch.Tensor:
        wrong = not fastmamba.report(model).patched and segment > 16
        return real(model, ids, segment) * (2.0 if wrong else 1.0)

    monkeypatch.setattr(prefill, "checked_logits", wrong_when_long)
    assert not measurement.row(40, list(prefill.SIDES), None, True)["check"]["passed"]
    assert not measurement.row(40, list(prefill.SIDES), ("patched", 16), True)["check"]["passed"], (
        "no witness of itself"
    )
    check = measurement.row(40, list(prefill.SIDES), ("original", 16), True)["check"]
    assert check["passed"] and check["original_in_one_piece"] == pytest.approx(0.5)


def test_running_out_of_memory_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("mamba2")
    measurement = prefill.Measurement(model, prefill.Settings(repeats=1), lambda side: None)
    real = prefill.checked_logits

    def full(model: torch.nn.Module, ids: torch.Tensor, segment: int) -> torch.Tensor:
        if not fastmamba.report(model).patched:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return real(model, ids, segment)

    monkeypatch.setattr(prefill, "checked_logits", full)
    row = measurement.row(40, list(prefill.SIDES), ("patched", 8), True)
    assert row["original"]["status"] == "out of memory"
    assert row["patched"]["status"] == "ok"
    assert row["check"]["passed"]
    assert prefill_timing.judge("m", row) == []


def test_only_the_patched_side_can_be_at_fault() -> None:
    assert prefill_timing.judge("m", ROW) == []
    assert prefill_timing.judge("m", ROW | {"patched": {"status": "crashed", "message": "boom"}})
    assert prefill_timing.judge("m", ROW | {"patched": {"status": "ok", "original_calls": {"gradients": 1}}})


class FakeProcess:
    """Stands in for a process that dies when the original runs at 20 tokens."""

    jobs: list[tuple] = []

    def __init__(self, *arguments: object) -> None:
        self.info = {"parameters": 1}

    def row(self, tokens: int, sides: list[str], segments: object, checks: bool) -> dict:
        self.jobs.append((tokens, tuple(sides)))
        if "original" in sides and tokens >= 20:
            raise prefill._Died("original", "illegal memory access")
        done = {"status": "ok", "median_ms": 2.0, "original_calls": {}}
        return {"tokens": tokens, "check": None} | {side: dict(done) for side in sides}

    def close(self) -> None:
        pass


def test_a_crash_of_the_original_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_Process", FakeProcess)
    FakeProcess.jobs = []
    rows = list(prefill.measure("m", [10, 20, 30], prefill.Settings()))
    assert [row["original"]["status"] for row in rows] == ["ok", "crashed", "not run"]
    assert [row["patched"]["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["speedup"] == 1.0 and rows[1]["speedup"] is None
    assert FakeProcess.jobs == [
        (10, ("patched", "original")),
        (20, ("patched", "original")),
        (20, ("patched",)),
        (30, ("patched",)),
    ]


@pytest.mark.usefixtures("forked")
def test_the_run_goes_on_when_the_process_is_killed(tmp_path: Path) -> None:
    small_model("mamba2").save_pretrained(tmp_path)

    def kill(side: str) -> None:
        if side == "original":
            (child,) = multiprocessing.active_children()
            child.kill()

    (row,) = prefill.measure(str(tmp_path), [16], prefill.Settings(repeats=1), phase=kill)
    assert row["original"]["status"] == "crashed"
    assert row["patched"]["status"] == "ok"
    assert row["check"]["passed"] and row["check"]["against"].startswith("patched")
    assert not multiprocessing.active_children()


def test_the_script_writes_table_plot_and_json(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_model("mamba2").save_pretrained(folder)
    command = [sys.executable, "examples/prefill_timing.py", "--device", "cpu", "--model", str(folder)]
    command += ["--tokens", "16,70", "--repeats", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout, "plain where it is not a terminal"
    assert "70 tokens" in done.stdout
    record = json.loads((tmp_path / "out" / "prefill_timing.json").read_text())
    assert record["passed"] is True
    assert [row["tokens"] for row in record["models"][0]["rows"]] == [16, 70]
    assert {"torch", "transformers", "fastmamba"} <= record["environment"]["versions"].keys()
    assert {"mamba_ssm", "causal_conv1d"} <= record["environment"]["peers"].keys()
    assert (tmp_path / "out" / "prefill_timing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("forked")
def test_it_says_what_it_cannot_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--tokens", "16", "--model", str(tmp_path / "nothing-here")]
    assert prefill_timing.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert "nothing-here" in capsys.readouterr().out
