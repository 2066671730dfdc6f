"""The table and the plot of a run, made from a record as a run writes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console

from evals import environment, ssd_speed
from evals.gpu_timing import summary
from evals.ssd_contenders import Contender
from evals.ssd_grid import GRID, MAMBA2_2B7


def timed(ms: float) -> dict[str, Any]:
    return summary([ms, ms * 1.1, ms * 0.9])


def cell(ms: float, status: str = "ok", remark: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"status": status, "remark": remark, "errors": [1e-3, 1e-3]}
    return found | {"gpu": timed(ms), "wall": timed(ms + 0.05), "host": timed(0.05)} if ms else found


@pytest.fixture
def record() -> dict[str, Any]:
    rows = [
        {
            "shape": vars(shape),
            "label": shape.label,
            "memory_floor_ms": 0.1,
            "matmul_floor_ms": 0.2,
            "hopper": cell(0.5 * (i + 1)),
            "portable": cell(1.0 * (i + 1), "wrong" if i == 1 else "ok"),
            "mamba_ssm": cell(2.0 * (i + 1), remark="given contiguous dt") if i < 3 else cell(0, "refused"),
        }
        for i, shape in enumerate(MAMBA2_2B7[:4])
    ]
    return {
        "environment": environment.record(torch.device("cpu")),
        "dtype": "bf16",
        "repeats": 3,
        "ceilings": {"copy_bytes_per_s": 4.2e12, "matmul_flop_per_s": 7e14},
        "contenders": ["hopper", "portable", "mamba_ssm"],
        "ours": ["hopper", "portable"],
        "rows": rows,
        "skipped": [],
    }


def test_speedups_are_of_right_results_only(record):
    rows = record["rows"]
    assert ssd_speed.speedup(rows[0], "mamba_ssm", "hopper", "gpu") == pytest.approx(4.0)
    assert ssd_speed.speedup(rows[0], "mamba_ssm", "hopper", "wall") == pytest.approx(2.05 / 0.55)
    assert ssd_speed.speedup(rows[1], "mamba_ssm", "portable", "gpu") is None  # wrong
    assert ssd_speed.speedup(rows[3], "mamba_ssm", "hopper", "gpu") is None  # the peer did not run


def test_table_and_plot(record, tmp_path):
    console = Console(width=220, record=True)
    console.print(ssd_speed.table(record))
    text = console.export_text()
    assert "4.20 TB/s" in text and "700 TFLOP/s" in text
    line = next(line for line in text.splitlines() if "4,096" in line)
    assert "WRONG" in line and "4.00x" in line and "*" in line and "0.200" in line
    assert "refused" in text
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(record))
    ssd_speed.draw(json.loads(path.read_text()), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


class CpuTimer:
    """Stands in for the GPU's."""

    device = torch.device("cpu")

    def gpu(self, call):
        call()
        return timed(1.0)

    def eager(self, call):
        call()
        return timed(2.0), timed(1.0)


def test_wrong_is_said_and_failing_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    shape = ssd_speed.Shape("small", 1, 96, 2, 16, 1, 16)

    def fails(case):
        raise RuntimeError("out of something")

    rivals = [
        Contender("right", lambda case: case.plain()),
        Contender("wrong", lambda case: (case.plain()[0] * 1.1, case.plain()[1])),
        Contender("fails", fails),
        Contender("refuses", fails, prepare=lambda case: (None, "too long")),
    ]
    best = {"copy_bytes_per_s": 1e12, "matmul_flop_per_s": 1e14}
    row = ssd_speed.measure_shape(shape, torch.bfloat16, rivals, CpuTimer(), best, 0)
    assert [row[rival.name]["status"] for rival in rivals] == ["ok", "wrong", "failed", "refused"]
    assert row["fails"]["error"] == "RuntimeError: out of something" and row["refuses"]["remark"] == "too long"
    assert row["right"]["wall"]["median_ms"] == 2.0 and "gpu" not in row["fails"]
    json.dumps(row)


def test_some_shapes_of_a_grid():
    chosen = ssd_speed.chosen(GRID, "N 256; 40 x 128")
    assert chosen and {(shape.state == 256, shape.heads) for shape in chosen} >= {(True, 24), (True, 48), (False, 40)}
    assert all(shape.state == 256 or (shape.heads, shape.head_dim) == (40, 128) for shape in chosen)
    assert ssd_speed.chosen(GRID, None) == GRID
    with pytest.raises(SystemExit, match="no name has 'N 512'"):
        ssd_speed.chosen(GRID, "N 256;N 512")
