"""Zeros that captured graphs are given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastmamba.kernels._sync import Spare  # noqa: E402


def test_each_part_is_its_own() -> None:
    spare = Spare(256, torch.device("cpu"))
    assert spare.take(1) is None  # nothing can be made in a capture
    spare.refill()
    first = [spare.take(count) for count in (40, 1, 160)]
    assert spare.take(1) is None
    spare.refill()
    parts = [*first, spare.take(256)]
    for number, part in enumerate(parts):
        assert part is not None and not part.any()
        part.fill_(number + 1)
    for number, part in enumerate(parts):
        assert part is not None and (part == number + 1).all()


def test_refilled_only_once_half_is_used() -> None:
    spare = Spare(256, torch.device("cpu"))
    spare.refill()
    before, _ = spare.take(32), spare.refill()
    after = spare.take(32)
    assert before is not None and after is not None
    assert after.data_ptr() == before.data_ptr() + 32 * 4
