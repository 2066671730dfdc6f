"""One-token steps against the recurrence over the same tokens."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from fastmamba.reference import ssd_recurrence, ssd_step
from fastmamba.testing import SsdCase, assert_golden, relative_error, ssd_case

ORACLE = 1e-12


def steps(case: SsdCase, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x, dt, A, B, C, D, z, dt_bias, states = case.arguments() if dtype is None else case.to(dtype)
    state = states.clone()
    outputs = [
        ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, None if z is None else z[:, t], dt_bias, softplus)
        for t, softplus in enumerate([case.dt_softplus] * x.shape[1])
    ]
    return torch.stack(outputs, dim=1), state


def check(case: SsdCase) -> None:
    oracle = ssd_recurrence(*case.to(torch.float64), case.dt_softplus, -math.inf, math.inf)
    for result, truth in zip(steps(case, torch.float64), oracle, strict=True):
        assert relative_error(result, truth) <= ORACLE
    plain = ssd_recurrence(*case.arguments(), case.dt_softplus, -math.inf, math.inf, compute_dtype=case.x.dtype)
    results = steps(case)
    assert results[0].dtype == case.x.dtype
    for result, plain_result, truth in zip(results, plain, oracle, strict=True):
        assert_golden(result, plain_result, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 2, 16, 1, 16), (3, 4, 6, 24, 2, 80), (2, 5, 4, 80, 4, 24)])
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(ssd_case(*shape, dtype=dtype, gate=True, initial=True))


@pytest.mark.parametrize("options", list(product([False, True], repeat=5)))
def test_options(options: tuple[bool, ...]) -> None:
    skip, per_channel_d, gate, bias, softplus = options
    options = {"skip": skip, "per_channel_d": per_channel_d, "gate": gate, "bias": bias, "dt_softplus": softplus}
    case = ssd_case(2, 3, 4, 8, 2, 16, initial=True, **options)
    if not softplus:
        case.dt = case.dt.abs()
        case.dt_bias = None if case.dt_bias is None else case.dt_bias.abs()
    check(case)


def test_dt_is_not_clamped() -> None:
    """As upstream: a negative step without softplus counts as it is."""
    case = ssd_case(1, 1, 2, 8, 1, 8, initial=True, bias=False, dt_softplus=False)
    case.dt = -case.dt.abs()
    check(case)


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.bfloat16])
def test_state_of_another_dtype(state_dtype: torch.dtype) -> None:
    case = ssd_case(2, 1, 4, 16, 2, 24, initial=True)
    x, dt, A, B, C, D, z, dt_bias, states = case.arguments()
    state = states.to(state_dtype)
    exact = ssd_recurrence(
        *(None if t is None else t.double() for t in (x, dt, A, B, C, D, z, dt_bias, state)), True, 0.0, math.inf
    )
    y = ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, dt_bias, True)
    assert y.dtype == x.dtype and state.dtype == state_dtype
    assert_golden(y[:, None], case.plain()[0], exact[0])
    assert_golden(state, exact[1].to(state_dtype), exact[1])


def test_strided_state_is_updated_in_place() -> None:
    case = ssd_case(2, 1, 4, 16, 2, 24, initial=True)
    x, dt, A, B, C, D, _, dt_bias, states = case.arguments()
    expected = states.clone()
    y = ssd_step(expected, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, dt_bias, True)
    memory = torch.full((2, 4, 24, 16, 2), torch.nan)
    strided = memory[..., 1].transpose(2, 3)
    strided.copy_(states)
    assert torch.equal(ssd_step(strided, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, dt_bias, True), y)
    assert torch.equal(strided, expected)
    assert memory[..., 0].isnan().all(), "and nothing beside it"
