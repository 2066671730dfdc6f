"""Reading what Nsight Compute prints."""

from __future__ import annotations

import pytest
from rich.console import Console

from evals import ssd_profile

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {  # name: (unit, value of the first kernel, of the second)
    "ID": ("", "0", "1"),
    "Kernel Name": ("", "_discretize(float, int)", "_walk"),
    "gpu__time_duration.sum": ("us", "1,234.50", "0.5"),
    "dram__bytes_read.sum": ("Gbyte", "1.5", "0"),
    "dram__bytes_write.sum": ("Mbyte", "250", "n/a"),
    "launch__registers_per_thread": ("register/thread", "255", "32"),
    STALL.format("long_scoreboard"): ("inst", "3", "1"),
    STALL.format("barrier"): ("inst", "1", "0"),
    "smsp__average_warps_issue_stalled_barrier_not_issued_per_issue_active.ratio": ("inst", "9", "9"),
}


def page() -> str:
    lines = [list(COLUMNS), [unit for unit, *_ in COLUMNS.values()]]
    lines += [[values[i] for _, *values in COLUMNS.values()] for i in range(2)]
    text = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 1\n{text}\n"


def test_a_page_is_read_in_one_unit_each():
    first, second = ssd_profile.parse(page())
    assert first["kernel"] == "_discretize(float, int)" and second["kernel"] == "_walk"
    assert first["metrics"] == {"time": 1234.5, "DRAM read": 1.5e9, "DRAM written": 2.5e8, "registers a thread": 255.0}
    assert second["metrics"]["DRAM written"] is None
    assert first["stalls"] == {"long_scoreboard": 3.0, "barrier": 1.0}


def test_the_table_shows_shares_and_the_least_traffic():
    console = Console(width=140, record=True)
    console.print(ssd_profile.table(ssd_profile.parse(page()), "a title", 2_000_000_000))
    lines = console.export_text().splitlines()
    assert any("long scoreboard" in line and "75%" in line and "100%" in line for line in lines)
    assert any("1,750 MB, 2,000 MB" in line for line in lines)
    assert any("registers" in line and "255" in line and "32" in line for line in lines)


@pytest.mark.parametrize("text", ["", "==ERROR== The profiler is not allowed to read counters\n"])
def test_no_kernel(text):
    assert ssd_profile.parse(text) == []
