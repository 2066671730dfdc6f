"""What the launch before a long SSD on Hopper leaves: what leaders walk of each head."""

from __future__ import annotations

import math
from itertools import zip_longest

import pytest
import torch

pytest.importorskip("triton")

from fastmamba.kernels import _leads  # noqa: E402
from fastmamba.kernels._dealt import NOTHING, Steps  # noqa: E402
from fastmamba.kernels._leads import Leads, deal_leads  # noqa: E402
from fastmamba.ssd_plan import Plan  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Q = 16


def _dealt(plan: Plan, rates: list[float], tokens: int, slices: int = 2, groups: int = 1) -> Leads:
    """Of heads whose decay over a chunk is 2 ** -rate, whatever the token."""
    A = -torch.tensor(rates, device=DEVICE) * math.log(2.0) / Q
    dt = torch.ones(1, tokens, len(rates), device=DEVICE)
    each = len(rates) * slices // groups
    slots = groups * plan.blocks_per_group
    steps = Steps(dt, A, None, False, 0.0, math.inf, False)
    return deal_leads(plan, steps, chunk=Q, slices=slices, slices_per_group=each, slots=slots)


@pytest.mark.parametrize(
    ("rates", "leaders", "unit", "most"),
    [
        ([0.0, 0.1, 1.0, 1.0, 9.0, 9.0, 99.0], 3, 4, 56),
        ([0.0] * 5, 3, 8, 48),
        ([99.0] * 3, 3, 4, 56),
        ([0.0] * 9, 3, 4, 56),
        ([0.0, 1.0, 1.0, 1.0, 1.0, 9.0], 1, 4, 56),
    ],
)
def test_leads_of_slow_heads_are_longer(rates: list[float], leaders: int, unit: int, most: int) -> None:
    chunks, segments = 240, 3
    plan = Plan(len(rates), segments, 80, leaders=leaders, unit=unit, most=most, first=0.5, handover=6.0, worth=1e9)
    found = _dealt(plan, rates, chunks * Q)
    leads = (found.leads[0] & 0xFFFF).tolist()
    assert all(lead % unit == 0 and 0 <= lead <= most for lead in leads)
    assert leads == sorted(leads, reverse=True)  # as rates are
    rows = found.pieces[0].tolist()
    walked = [[(e & 0xFFFF, e >> 16) for e in row if e >= 0] for row in rows]
    for row, pieces in zip(rows, walked, strict=True):
        assert 0 < len(pieces) <= len(row) - 2 and row[len(pieces) :] == [-1] * (len(row) - len(pieces))
        # A slot's pieces in a row, from its beginning on: the state goes on from one to the next.
        own = list(dict.fromkeys(slot for slot, _ in pieces))
        assert pieces == [(slot, i) for slot in own for i in range(leads[slot] // unit)]
    assert sorted(slot for pieces in walked for slot in {s for s, _ in pieces}) == [i for i, n in enumerate(leads) if n]

    def time(rate: float, lead: float) -> float:
        whole = (chunks * (segments - 1) + lead) / segments**2
        needed = 2 * -NOTHING.value / rate if rate else math.inf
        return plan.handover + plan.first * min(whole, needed) + (chunks - lead) / segments

    def ends(leads: list[int]) -> float:
        """When the last block does, with leads of any lengths and slots given to leaders in turn and back."""
        turns = [leads[i : i + leaders][:: 1 if i // leaders % 2 == 0 else -1] for i in range(0, len(leads), leaders)]
        turns[-1] = turns[-1] if len(turns) % 2 else [0] * (leaders - len(turns[-1])) + turns[-1]
        return max(*map(time, rates, leads), *map(sum, zip_longest(*turns, fillvalue=0)))

    best = min(
        ends([min(range(0, most + 1, unit), key=lambda lead: (time(rate, lead) > level, lead)) for rate in rates])
        for level in range(60, 160)
    )
    assert max(*map(time, rates, leads), *(unit * len(pieces) for pieces in walked)) <= best * 1.02 + 1


def test_a_slot_is_as_slow_as_its_slower_head() -> None:
    # Two groups of three heads, a slice each: slots have heads (0, 1), (2), (3, 4), (5).
    plan = Plan(2, 2, 60, leaders=2, unit=4, most=40, first=0.5, handover=3.0, worth=1e9)
    leads = _dealt(plan, [50.0, 0.0, 50.0, 50.0, 50.0, 0.0], 120 * Q, 1, 2).leads[0]
    assert (leads >> 16).tolist() == [32767, 1, 1, 32767]
    leads = (leads & 0xFFFF).tolist()
    assert min(leads[0], leads[3]) > max(leads[1], leads[2])


def test_all_leads_are_alike_where_different_ones_gain_too_little() -> None:
    plan = Plan(4, 2, 60, lead=24, leaders=2, unit=8, most=40, first=0.5, handover=3.0, worth=10.0)
    found = _dealt(plan, [50.0, 0.0, 50.0, 50.0], 120 * Q)
    assert found.leads[0].tolist() == [24 | 32767 << 16] * 4
    assert sorted((found.pieces[0] >= 0).sum(1).tolist()) == [6, 6]


def test_falls_are_those_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batch, tokens, heads = 2, 5 * Q + 5, 18
    plan = Plan(18, 2, 3, leaders=1, unit=4, most=4, first=0.5, handover=3.0, worth=1e9)
    dt = 3 * torch.randn(batch, tokens, heads + 2, device=DEVICE, dtype=torch.bfloat16)[..., 1:-1]
    A_log, bias = torch.randn(heads, device=DEVICE), torch.randn(heads, device=DEVICE)
    shape = {"chunk": Q, "slices": 2, "slices_per_group": 36, "slots": 18}
    found = deal_leads(plan, Steps(dt, A_log, bias, True, 0.0, 2.0, True), **shape)
    step = torch.nn.functional.softplus(dt.double() + bias.double()).clamp(0.0, 2.0)
    log2 = step * -A_log.double().exp() / math.log(2.0)
    expected = torch.nn.functional.pad(log2, (0, 0, 0, 6 * Q - tokens)).view(batch, 6, Q, heads).sum(2).transpose(1, 2)
    torch.testing.assert_close(found.falls.double(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(_leads, "_APART", 0)  # by a launch of their own
    apart = deal_leads(plan, Steps(dt, A_log, bias, True, 0.0, 2.0, True), **shape)
    assert all(torch.equal(mine, its) for mine, its in zip(found, apart, strict=True))
    dt[0, 2 * Q + 1, 3] = math.nan
    falls = deal_leads(plan, Steps(dt, A_log, bias, True, 0.0, math.inf, True), **shape).falls
    assert falls.isnan().nonzero().tolist() == [[0, 3, 2]]
