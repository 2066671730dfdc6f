"""The chunked scan against the token-by-token recurrence: in float64 they agree, else the recurrence sets the error."""

from __future__ import annotations

import math
import sys
from itertools import product

import pytest
import torch

from fastmamba.reference import ssd, ssd_recurrence
from fastmamba.testing import SsdCase, assert_golden, random_ssd_case, relative_error, ssd_case

ORACLE = 1e-12  # two ways to sum the same products in float64
SHAPES = [  # B, T, H, P, G, N
    (1, 1, 2, 16, 1, 16),
    (2, 5, 3, 24, 3, 80),
    (1, 63, 4, 16, 2, 24),
    (1, 64, 4, 80, 4, 16),
    (2, 65, 6, 24, 2, 32),
    (1, 128, 2, 64, 1, 128),
    (1, 321, 4, 16, 1, 24),
    (1, 600, 2, 24, 2, 16),
]


def chunked(case: SsdCase, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = case.arguments() if dtype is None else case.to(dtype)
    return ssd(*arguments, case.dt_softplus, *case.dt_limit, case.chunk_size)


def exact(case: SsdCase) -> tuple[torch.Tensor, torch.Tensor]:
    return ssd_recurrence(*case.to(torch.float64), case.dt_softplus, *case.dt_limit)


def check(case: SsdCase) -> None:
    """Float64 against the oracle, then the case's own dtype against what the recurrence errs in it."""
    oracle = exact(case)
    for result, truth in zip(chunked(case, torch.float64), oracle, strict=True):
        assert relative_error(result, truth) <= ORACLE, str(case)
    results = chunked(case)
    for name, result, plain, truth in zip(("y", "states"), results, case.plain(), oracle, strict=True):
        assert result.isfinite().all()
        assert_golden(result, plain, truth, what=f"{name} of {case}")
    assert results[0].is_contiguous() and results[0].dtype == case.x.dtype and results[0].shape == case.x.shape
    assert results[1].is_contiguous() and results[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(ssd_case(*shape, dtype=dtype, gate=True, initial=True))


@pytest.mark.parametrize("options", list(product([False, True], repeat=5)))
def test_options(options: tuple[bool, ...]) -> None:
    skip, gate, bias, initial, softplus = options
    case = ssd_case(2, 70, 4, 8, 2, 16, skip=skip, gate=gate, bias=bias, initial=initial, dt_softplus=softplus)
    if not softplus:
        case.dt = case.dt.abs()
    check(case)


@pytest.mark.parametrize("seed", range(12))
def test_random(seed: int) -> None:
    case = random_ssd_case(seed, small=True)
    if not case.dt_softplus:
        case.dt = case.dt.abs()
        case.dt_bias = None
    check(case)


@pytest.mark.parametrize("per_channel_d", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 48, 128, 1000])
def test_chunk_sizes(chunk_size: int, per_channel_d: bool) -> None:
    check(ssd_case(1, 100, 2, 16, 1, 24, per_channel_d=per_channel_d, chunk_size=chunk_size))


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_tiles(chunks: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are worked on a few chunks at a time, in memory that each tile finds as the last one left it."""
    case = ssd_case(2, 170, 6, 16, groups, 24, gate=True, initial=True, chunk_size=16)
    monkeypatch.setattr(sys.modules["fastmamba.reference.ssd"], "_TILE", chunks * 16 * 6 * 16)
    check(case)
    case.x = case.x.clone().requires_grad_()
    for result, truth in zip(chunked(case, torch.float64), exact(case), strict=True):
        assert relative_error(result.detach(), truth.detach()) <= ORACLE


@pytest.mark.parametrize("heads", [1, 5, 9, 14])
def test_a_lone_group_of_any_number_of_heads(heads: int) -> None:
    check(ssd_case(1, 70, heads, 8, 1, 16))


@pytest.mark.parametrize("limit", [(0.0, 0.02), (0.5, math.inf), (0.3, 0.3), (-math.inf, math.inf)])
def test_dt_limit(limit: tuple[float, float]) -> None:
    check(ssd_case(1, 130, 2, 16, 1, 16, dt_limit=limit))


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 30.0, 1e3, 1e6, 1e30])
def test_any_decay(scale: float) -> None:
    """From none at all to a state that every token replaces, where sums of logarithms leave exp's range."""
    case = ssd_case(1, 150, 4, 16, 2, 16, initial=True)
    case.A = case.A * scale
    check(case)


def test_one_token_that_forgets_everything() -> None:
    """A single enormous step in the middle of a chunk must not blur the decays of its neighbours."""
    case = ssd_case(1, 100, 2, 16, 1, 16, initial=True, bias=False, dt_softplus=False)
    case.dt = case.dt.abs() * 0.01
    case.dt[:, 40] = 1000.0
    check(case)
    case.dt[:, 40] = 3e38
    assert all(result.isfinite().all() for result in chunked(ssd_case_without_input_at(case, 40)))


def ssd_case_without_input_at(case: SsdCase, token: int) -> SsdCase:
    """The same case with x and B zero there, so that only the decay of that token is left."""
    case.x[:, token] = 0
    case.B[:, token] = 0
    return case


def test_growing_states() -> None:
    """A > 0 is nothing that a model has, but it is defined: the mask above the diagonal comes before exp."""
    case = ssd_case(1, 150, 2, 16, 1, 16, initial=True)
    case.A = torch.tensor([0.5, 3.0])
    check(case)
    case.A = torch.tensor([400.0, -400.0])  # head 0 overflows in the end, its first tokens and head 1 don't
    y, states = chunked(case)
    assert y[:, 0].isfinite().all() and y[:, :, 1].isfinite().all() and states[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("first", [1, 63, 64, 100])
def test_continuing_from_states(first: int, dtype: torch.dtype) -> None:
    case = ssd_case(2, 140, 4, 16, 2, 24, gate=True, initial=True)
    x, dt, A, B, C, D, z, dt_bias, states = case.to(dtype)
    given = states.clone()
    parts = []
    for now in (slice(None, first), slice(first, None)):
        part, states = ssd(
            x[:, now], dt[:, now], A, B[:, now], C[:, now], D, z[:, now], dt_bias, states, True, 0.0, math.inf
        )
        parts.append(part)
    assert torch.equal(case.initial_states.to(dtype), given), "initial_states is not written to"
    whole, oracle = case.to(dtype), exact(case)
    plain = ssd_recurrence(*whole, True, 0.0, math.inf)
    results = (torch.cat(parts, dim=1), states)
    for result, plain_result, truth in zip(results, plain, oracle, strict=True):
        if dtype == torch.float64:
            assert relative_error(result, truth) <= ORACLE
        else:
            assert_golden(result, plain_result, truth)


def test_any_strides() -> None:
    case = ssd_case(2, 70, 4, 16, 2, 24, gate=True, initial=True)
    expected = ssd(*case.arguments(), True, 0.0, math.inf)

    def shuffled(tensor: torch.Tensor | None) -> torch.Tensor | None:
        """The same values with the axes the other way round in memory, every other one unused."""
        if tensor is None:
            return None
        reverse = tuple(range(tensor.dim()))[::-1]
        memory = torch.full((*tensor.permute(reverse).shape, 2), torch.nan)
        memory[..., 1] = tensor.permute(reverse)
        return memory[..., 1].permute(reverse)

    results = ssd(*(shuffled(tensor) for tensor in case.arguments()), True, 0.0, math.inf)
    for result, same, plain, truth in zip(results, expected, case.plain(), exact(case), strict=True):
        assert result.is_contiguous() and result.shape == same.shape
        assert_golden(result, plain, truth)


def test_mixed_dtypes_of_parameters() -> None:
    """x, B, C and z share a dtype; dt and the parameters may each have their own."""
    case = ssd_case(1, 70, 2, 16, 1, 16, dtype=torch.bfloat16, gate=True, initial=True)
    case.A, case.dt, case.D = case.A.to(torch.bfloat16), case.dt.to(torch.float16), case.D.double()
    case.dt_bias, case.initial_states = case.dt_bias.to(torch.float16), case.initial_states.to(torch.bfloat16)
    check(case)


def test_same_bits_every_time() -> None:
    case = ssd_case(1, 300, 4, 16, 1, 24, gate=True)
    first, again = chunked(case), chunked(case)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("per_channel_d", [False, True])
def test_gradients(per_channel_d: bool) -> None:
    case = ssd_case(2, 7, 4, 3, 2, 2, gate=True, initial=True, per_channel_d=per_channel_d)
    inputs = [tensor.requires_grad_() for tensor in case.to(torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: ssd(*tensors, True, 0.0, math.inf, 3), inputs, fast_mode=True)


def test_gradients_without_options() -> None:
    case = ssd_case(1, 5, 2, 3, 1, 2, skip=False, bias=False)
    x, dt, A, B, C = (tensor.double().requires_grad_() for tensor in case.arguments()[:5])

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ssd(*tensors, None, None, None, None, False, -math.inf, math.inf, 2)

    assert torch.autograd.gradcheck(run, (x, dt, A, B, C), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recording_is_as_precise(dtype: torch.dtype) -> None:
    case = ssd_case(2, 150, 4, 16, 2, 24, dtype=dtype, gate=True, initial=True)
    expected = chunked(case)
    case.x = case.x.clone().requires_grad_()
    results = chunked(case)
    assert all(result.requires_grad for result in results)
    for result, plain, truth, same in zip(results, case.plain(), exact(case), expected, strict=True):
        assert result.shape == same.shape and result.dtype == same.dtype
        assert_golden(result.detach(), plain.detach(), truth.detach())
    with torch.no_grad():
        for result, same in zip(chunked(case), expected, strict=True):
            assert torch.equal(result, same)


def test_gradients_survive_strong_decays() -> None:
    """What the mask hides would overflow: it must not reach the gradients as NaN either."""
    case = ssd_case(1, 70, 2, 8, 1, 8)
    inputs = [tensor.requires_grad_() for tensor in (case.x.clone(), case.dt.clone(), case.A * 1000)]
    y, states = ssd(*inputs, *case.arguments()[3:], True, 0.0, math.inf)
    (y.sum() + states.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


def test_autocast_leaves_it_alone() -> None:
    case = ssd_case(1, 70, 2, 16, 1, 16)
    expected = chunked(case)
    case.x = case.x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        results = chunked(case)
    for result, plain, truth, same in zip(results, case.plain(), exact(case), expected, strict=True):
        assert result.dtype == same.dtype
        assert_golden(result.detach(), plain.detach(), truth.detach())
