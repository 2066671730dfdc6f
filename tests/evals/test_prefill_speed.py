"""evals/prefill_speed.py on a small model, and what it computes beside the timings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals import prefill, prefill_speed, shapes
from evals.prefill_floor import floor
from evals.prefill_kinds import kind_of


class FixedRates:
    """A GPU that multiplies 1e12 times a second and copies 1e9 bytes."""

    def linear(self, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        return 2 * tokens * inputs * outputs / 1e12

    def attention(self, tokens: int, heads: int, width: int, dtype: torch.dtype) -> float:
        return 2 * tokens**2 * heads * width / 1e12

    def copy(self) -> float:
        return 1e9


def test_floor_of_mamba2() -> None:
    model = shapes.build("mamba2-130m", 2, torch.bfloat16, torch.device("cpu"), 0)
    found = floor(model, FixedRates(), 2, 100)
    inner, conv, heads, hidden = 1536, 1536 + 2 * 128, 24, 768
    products = 2 * 200 * hidden * (2 * inner + 256 + heads) + 2 * 200 * inner * hidden
    assert found["matrix_ms"] == pytest.approx(2 * products / 1e9)
    mixer = 2 * (2 * conv) + 2 * (conv + heads + inner) + 2 * 3 * inner  # bytes a token: convolution, SSD, gated norm
    norm = hidden * 2 * (4 + 2)  # residual in float32, branch and result in bfloat16, each read and written
    assert found["activations_ms"] == pytest.approx(200 * 2 * (mixer + norm) / 1e6)
    assert found["attention_ms"] == 0 and found["total_ms"] == found["matrix_ms"] + found["activations_ms"]


def test_floor_of_experts_and_attention() -> None:
    model = shapes.build("granite-4.0-h-tiny", 2, torch.bfloat16, torch.device("meta"), 0)
    found, config = floor(model, FixedRates(), 1, 10), model.config
    experts = 2 * 3 * 2 * 10 * config.num_experts_per_tok * config.hidden_size * config.intermediate_size
    shared = 2 * 3 * 2 * 10 * config.hidden_size * config.shared_intermediate_size
    assert found["matrix_ms"] > (experts + shared) / 1e9
    assert found["matrix_ms"] < 2.5 * (experts + shared) / 1e9
    assert found["attention_ms"] == pytest.approx(2 * 100 * config.hidden_size / 1e9)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_ssd_kernel", "SSD"),
        ("_kernel", "SSD"),
        ("wide_kernel", "SSD"),
        ("_scores_kernel", "SSD"),
        ("_own_scores_kernel", "SSD"),
        ("_chunk_scan_fwd_kernel", "SSD"),
        ("_conv_kernel", "convolution"),
        ("void conv_depthwise2d_forward_kernel", "convolution"),
        ("nvjet_tst_128x256_64x4", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("_rms_norm_kernel", "norms"),
        ("_silu_and_mul_kernel", "MLP gate"),
        ("void at::native::elementwise_kernel", "everything else"),
        ("Memcpy DtoD (Device -> Device)", "everything else"),
    ],
)
def test_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_run(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32", "--model", "mamba2-130m", "--layers", "1", "--repeats", "2"]
    arguments += [
        "--enough",
        "0.0001",
        "--breakdown-tokens",
        "",
        "--tokens",
        "32,48",
        "--ssd-tokens",
        "32",
        "--original-tokens",
        "32,48",
        "--output",
        str(tmp_path),
    ]
    assert prefill_speed.main([*arguments, "--in-process", "--prefill-chunk-tokens", "16"]) == 0
    (model,) = json.loads((tmp_path / "prefill_speed.json").read_text())["models"]
    first, second = model["rows"]
    for row in (first, second):
        assert row["patched"]["status"] == row["original"]["status"] == "ok"
        assert row["check"]["passed"] and row["speedup"] > 0
        assert len(row["patched"]["ms"]) == 1  # enough
    assert first["ssd"]["status"] == "ok" and second["ssd"]["status"] == "not run"
    assert "block" in model["report"] or "norms and residual adds" in model["report"]
    assert "cut into pieces of 16 tokens" in model["report"]
    assert (tmp_path / "prefill_speed.png").exists()


def test_faults_are_told() -> None:
    ok = {"status": "ok", "median_ms": 1.0, "original_calls": {}}
    row = {"tokens": 64, "patched": ok, "original": ok, "check": {"passed": True}}
    model = {"name": "m", "batch": 1}
    assert prefill_speed.judge(model, row) == []
    crashed = {"status": "crashed", "message": "illegal memory access"}
    assert "patched crashed" in prefill_speed.judge(model, row | {"patched": crashed})[0]
    assert prefill_speed.judge(model, row | {"original": crashed}) == []  # a result, not a fault
    assert "ssd ran the original" in prefill_speed.judge(model, row | {"ssd": ok | {"original_calls": {"x": 1}}})[0]
    assert "outputs differ" in prefill_speed.judge(model, row | {"check": {"passed": False}})[0]
    assert prefill.Settings(lengths={"ssd": frozenset([8])}).runs("ssd", 9) is False
