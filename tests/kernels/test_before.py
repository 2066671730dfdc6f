"""What the launch before the SSD leaves: who walks what, and how chunks decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastmamba.kernels._before import before  # noqa: E402
from fastmamba.kernels._dealt import MOST, NOTHING, Costs, Slots, Steps  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q = 16


def _steps(rates: list[float], tokens: int, batch: int = 1) -> Steps:
    """Heads whose decay over a chunk is 2 ** -rate, whatever the token."""
    A = -torch.tensor(rates, device=DEVICE) * math.log(2.0) / Q
    return Steps(torch.ones(batch, tokens, len(rates), device=DEVICE), A, None, False, 0.0, math.inf, False)


def _slots(heads: int) -> Slots:
    return Slots(heads, 1, heads, heads, 1)


def _entries(dealt: Tensor) -> list[tuple[int, int, int]]:
    return [(e & 0xFFFF, e >> 16 & 0xFF, e >> 24) for e in dealt.tolist() if e >= 0]


def _time(costs: Costs, needed: float, k: int, chunks: int) -> float:
    """What the slowest block of k segments takes, by the model of first passes that are not shared."""
    each = chunks / k
    if k == 1:
        return each
    time = costs.start + costs.first * min(needed + 2, each) + each
    return time if needed < each else time + costs.handover + costs.wait * k


def _fewest(costs: Costs, needed: float, time: float, chunks: int) -> float:
    """Segments that end by that time."""
    counts = range(1, min(MOST.value, chunks) + 1)
    return next((k for k in counts if _time(costs, needed, k, chunks) <= time), math.inf)


@pytest.mark.parametrize(
    ("rates", "blocks"),
    [([0.0, 40.0, 40.0], 9), ([0.1, 1.0, 10.0, 100.0, -1.0], 17), ([1.0] * 4, 4), ([1.0] * 6, 16), ([0.0], 40)],
)
@pytest.mark.parametrize("chunks", [60, 3])
def test_blocks_are_dealt_out_so_that_all_end_soonest(rates: list[float], blocks: int, chunks: int) -> None:
    costs = Costs(0.5, 1.0, 3.0, 0.3)
    steps = _steps(rates, chunks * Q - 3)
    dealt = before(steps, _slots(len(rates)), costs, Q, blocks, groups=1, shared=False, falls=False).dealt[0]
    entries = _entries(dealt)
    segments = [sum(slot == i for slot, _, _ in entries) for i in range(len(rates))]
    assert sorted(entries) == [(i, s, k) for i, k in enumerate(segments) for s in range(k)]
    assert entries == sorted(entries, key=lambda entry: (entry[1], entry[0]))
    assert (dealt[len(entries) :] == -1).all() and min(segments) >= 1 and max(segments) <= min(MOST.value, chunks)
    needed = [-NOTHING.value / rate if rate > 0 else 1e6 for rate in rates]
    took = max(_time(costs, n, k, chunks) for n, k in zip(needed, segments, strict=True))
    possible = [_time(costs, n, k, chunks) for n in needed for k in range(1, MOST.value + 1)]
    best = min(t for t in possible if sum(_fewest(costs, n, t, chunks) for n in needed) <= blocks)
    assert took <= best + chunks / 1000


def test_falls_are_those_of_chunks() -> None:
    torch.manual_seed(0)
    batch, tokens, heads, groups = 2, 3 * Q + 5, 6, 2
    dt = torch.randn(batch, tokens, heads + 2, device=DEVICE, dtype=torch.bfloat16)[..., 1:-1]
    A_log, bias = torch.randn(heads, device=DEVICE), torch.randn(heads, device=DEVICE)
    steps = Steps(dt, A_log, bias, True, 0.0, 0.7, True)
    found = before(steps, _slots(heads), Costs(0.5, 1.0, 3.0), Q, heads, groups=groups, shared=True, falls=True)
    assert found.falls is not None
    step = torch.nn.functional.softplus(dt.double() + bias.double()).clamp(0.0, 0.7)
    log2 = step * -A_log.double().exp() / math.log(2.0)
    expected = torch.nn.functional.pad(log2, (0, 0, 0, 4 * Q - tokens)).view(batch, 4, Q, heads).sum(2).transpose(1, 2)
    torch.testing.assert_close(found.falls.double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_beside() -> None:
    torch.manual_seed(0)
    B, C = torch.randn(2, 1, 2 * Q + 3, 2, 20, device=DEVICE).unbind(0)
    steps = _steps([1.0, 2.0], 2 * Q + 3)
    found = before(steps, _slots(2), Costs(0.5, 1.0, 3.0), Q, 3, groups=2, shared=False, falls=False, B=B, C=C)
    assert found.scores is not None
    B, C = (torch.nn.functional.pad(v, (0, 0, 0, 0, 0, Q - 3)).view(1, 3, Q, 2, 20) for v in (B, C))
    torch.testing.assert_close(found.scores, torch.einsum("bcsgn,bctgn->bgcst", B, C))


def test_odd_slices_are_of_their_own_head() -> None:
    # three slices a head, two to a slot: slots of a group have heads (0, 0), (0, 1), (1, 1), then (2, 2), (2)
    steps = _steps([50.0, 0.0, 50.0, 50.0], 60 * Q)
    slots = Slots(6, 3, 6, 3, 2)
    dealt = before(steps, slots, Costs(0.5, 1.0, 3.0), Q, 24, groups=2, shared=False, falls=False).dealt[0]
    segments = [sum(slot == i for slot, _, _ in _entries(dealt)) for i in range(6)]
    assert min(segments[1:3]) > max(segments[0], *segments[3:])


def test_zeros() -> None:
    found = before(
        _steps([1.0], Q), _slots(1), Costs(0.5, 1.0, 3.0), Q, 1, groups=1, shared=False, falls=False, flags=1500
    )
    assert found.flags is not None and found.flags.shape == (1500,) and not found.flags.any()
