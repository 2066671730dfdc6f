"""The check that stands before every timing: it sees what is wrong, over any length."""

from __future__ import annotations

import math

import pytest
import torch

from evals import ssd_check
from evals.ssd_contenders import _within_32_bits
from evals.ssd_grid import GRID, Shape
from fastmamba.testing import SsdCase, relative_error, ssd_case


@pytest.fixture
def case(monkeypatch) -> SsdCase:
    monkeypatch.setattr(ssd_check, "PIECE", 4 * 16 * 64)  # pieces of 64 tokens
    return ssd_case(2, 200, 2, 16, 1, 16, dtype=torch.bfloat16, initial=True, gate=True)


def test_pieces_are_the_whole(case):
    y, states = case.oracle()
    found = list(ssd_check.oracle_pieces(case))
    assert [part.stop - part.start for part, *_ in found] == [64, 64, 64, 8]
    assert relative_error(torch.cat([piece for _, piece, _ in found], dim=1), y) < 1e-14
    assert relative_error(found[-1][2], states) < 1e-14


def test_errors_are_those_of_the_whole(case):
    oracle, plain = case.oracle(), case.plain()
    spoilt = plain[0].clone(), plain[1]
    spoilt[0][1, 150] = torch.nan
    exact, usual, bad = ssd_check.errors(case, [oracle, plain, spoilt])
    assert max(exact) < 1e-14
    assert usual == pytest.approx(tuple(map(relative_error, plain, oracle)), rel=1e-9)
    assert math.isnan(bad[0]) and bad[1] == usual[1]


def test_allowed_tells_a_right_result_from_a_wrong_one(case):
    limits = ssd_check.allowed(case)
    y, states = case.plain()
    shifted = y.roll(1, dims=1), states
    late = y.clone(), states * 1.2
    late[0][:, -3:] *= 1.5
    right, *wrong = ssd_check.errors(case, [(y, states), shifted, late])
    assert all(error <= limit for error, limit in zip(right, limits, strict=True))
    assert wrong[0][0] > limits[0]
    assert wrong[1][0] > limits[0] and wrong[1][1] > limits[1]


def meta(tokens: int, heads: int) -> SsdCase:
    inner = heads * 64
    conv = torch.empty(1, tokens, inner + 256, dtype=torch.bfloat16, device="meta")
    x, B, C = conv.split((inner, 128, 128), dim=-1)
    projected = torch.empty(1, tokens, 2 * inner + 256 + heads, dtype=torch.bfloat16, device="meta")
    view = (1, tokens, 1, 128)
    A = torch.empty(heads, device="meta")
    return SsdCase(x.view(1, tokens, heads, 64), projected[..., -heads:], A, B.view(view), C.view(view))


def test_who_counts_in_32_bits_gets_copies_or_is_left_out():
    short = meta(65536, 80)
    assert _within_32_bits(short) == (short, "")
    long = meta(2**18, 80)
    taken, remark = _within_32_bits(long)
    assert taken is not None and taken.dt.is_contiguous() and taken.x is long.x
    assert remark == "given contiguous dt: its offsets are 32-bit"
    taken, remark = _within_32_bits(meta(2**18, 128))
    assert taken is None and "32-bit" in remark


def test_the_floors_count_what_the_call_needs():
    shape = Shape("Mamba2-2.7B", 1, 131072, 80)
    case = Shape("", 2, 96, 6, 16, 3, 24).case(torch.bfloat16, torch.device("cpu"))
    tensors = (case.x, case.dt, case.B, case.C, case.x)  # y has the size of x
    least = sum(tensor.numel() * 2 for tensor in tensors) + 2 * 6 * 16 * 24 * 4
    assert Shape("", 2, 96, 6, 16, 3, 24).bytes(torch.bfloat16) == least
    assert shape.bytes(torch.bfloat16) / 4.28e12 == pytest.approx(0.648e-3, rel=0.05)
    # per token and head: y += S C and S += x B^T, 2 N P each, and a row of scores times x, 2 Q P; C.B once
    assert shape.flops() == 131072 * (80 * (4 * 128 * 64 + 2 * 64 * 64) + 2 * 64 * 128)
    assert len(set(GRID)) == len(GRID)
