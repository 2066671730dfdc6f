"""The SSD over a sequence: both backends against the float64 oracle, and what the op promises besides."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastmamba import configs
from fastmamba.ops import ssd
from fastmamba.testing import SsdCase, assert_golden, random_ssd_case, relative_error, ssd_case


def check(case: SsdCase, backend: str) -> None:
    y, final = ssd(*case.arguments(), **case.keywords(), backend=backend)
    y_oracle, final_oracle = case.oracle()
    y_plain, final_plain = case.plain()
    assert y.shape == case.x.shape and y.dtype == case.x.dtype and y.is_contiguous()
    assert final.dtype == torch.float32
    assert_golden(y, y_plain, y_oracle, what=f"y of {case}")
    assert_golden(final, final_plain, final_oracle, what=f"final states of {case}")


@pytest.mark.parametrize("seed", range(40))
def test_random_small_cases(seed: int, backend: str, device: torch.device) -> None:
    check(random_ssd_case(seed, device=device, small=True), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_random_cases(seed: int) -> None:
    check(random_ssd_case(seed, device="cuda"), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_enough_to_be_split(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = ssd_case(2, 333, 2, 16, 1, 16, dtype=dtype, device=device, initial=True, gate=True, chunk_size=16)
    check(case, backend)


@pytest.mark.parametrize("backend", ["triton"])  # the PyTorch backend hands states over in float32
def test_handing_states_over_in_half_precision(backend: str, device: torch.device) -> None:
    case = ssd_case(1, 333, 2, 16, 1, 16, dtype=torch.bfloat16, device=device, chunk_size=16)
    case.A = case.A / 100  # so that what is handed over matters
    exact, _ = ssd(*case.arguments(), **case.keywords(), backend=backend)
    half, _ = ssd(*case.arguments(), **case.keywords(), state_dtype=torch.bfloat16, backend=backend)
    oracle, _ = case.oracle()
    assert not torch.equal(half, exact)
    # one more rounding of the state, which is one of several terms
    assert relative_error(half, oracle) <= 2 * relative_error(exact, oracle)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relaxed_precision_costs_a_few_roundings(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = ssd_case(1, 130, 2, 16, 1, 16, dtype=dtype, device=device, chunk_size=32)
    exact, _ = ssd(*case.arguments(), **case.keywords(), backend=backend)
    relaxed, _ = ssd(*case.arguments(), **case.keywords(), precision="relaxed", backend=backend)
    oracle, _ = case.oracle()
    assert not torch.equal(relaxed, exact)
    # scores, decays and their product are each rounded where only the product was
    assert relative_error(relaxed, oracle) <= 3 * relative_error(exact, oracle)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_by_tensor_descriptors(
    dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmamba.kernels import ssd_portable

    described = []
    describe = ssd_portable._descriptor
    monkeypatch.setattr(ssd_portable, "copy_engine", lambda device: True)
    monkeypatch.setattr(ssd_portable, "_descriptor", lambda *given: described.append(given) or describe(*given))
    with configs.override("portable"):
        check(ssd_case(2, 333, 4, 32, 2, 16, dtype=dtype, device=device, initial=True, chunk_size=16), backend)
        config = configs.ssd_config(device, dtype, 2, 333, 4, 32, 16, 16)
    larger = config.segments > 1 and dtype == torch.bfloat16  # tiles of the first pass, two chunks each
    assert len(described) == (6 if larger else 4)
    assert ssd_portable._launch._described  # or the launcher would take them for tensors, on a GPU


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("segments", [1, 2])
def test_scores_worked_out_beforehand(
    segments: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmamba.kernels import ssd_portable

    monkeypatch.setattr(ssd_portable, "copy_engine", lambda device: True)  # the first pass takes two chunks at a time
    case = ssd_case(2, 75, 4, 16, 2, 16, dtype=torch.bfloat16, device=device, initial=True)
    with configs.override("portable"):
        chosen = configs.ssd_config(device, case.x.dtype, 2, 75, 4, 16, 16, None)
    with configs.override(dataclasses.replace(chosen, chunk=16, segments=segments, stages=4, scores=True)):
        check(case, backend)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("scores", [False, True])
def test_what_a_token_itself_adds_is_not_rounded_before_y_is(scores: bool, backend: str, device: torch.device) -> None:
    case = ssd_case(1, 40, 2, 16, 1, 16, dtype=torch.float16, device=device, bias=False, dt_softplus=False)
    case.dt = case.dt.abs() + 1
    case.A = case.A - 100  # nothing else is left of what other tokens add
    with configs.override("portable"):
        chosen = configs.ssd_config(device, case.x.dtype, 1, 40, 2, 16, 16, None)
    with configs.override(dataclasses.replace(chosen, chunk=16, scores=scores)):
        y, _ = ssd(*case.arguments(), **case.keywords(), backend=backend)
    oracle, _ = case.oracle()
    assert ((y - oracle).abs() <= torch.finfo(torch.float16).eps / 2 * 1.01 * oracle.abs() + 1e-7).all()


@pytest.mark.parametrize("backend", ["triton"])
def test_segments_past_those_that_one_looks_back_to(backend: str, device: torch.device) -> None:
    case = ssd_case(1, 285, 1, 16, 1, 16, dtype=torch.bfloat16, device=device, initial=True)
    case.A = case.A / 10  # or nothing would be left of what lies so far back
    with configs.override("portable"):
        chosen = configs.ssd_config(device, case.x.dtype, 1, 285, 1, 16, 16, None)
    with configs.override(dataclasses.replace(chosen, chunk=16, segments=18)):
        check(case, backend)


# How fast heads forget: over three segments, within a token, and one that grows.
RATES = (-0.01, -2000.0, 0.05, -3.0)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_passes_leave_out_what_has_decayed(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = ssd_case(1, 130, 4, 16, 1, 16, dtype=dtype, device=device, initial=True)
    case.A = torch.tensor(RATES, device=device)
    with configs.override("portable"):
        chosen = configs.ssd_config(device, dtype, 1, 130, 4, 16, 16, None)
    with configs.override(dataclasses.replace(chosen, chunk=16, segments=3)):
        check(case, backend)
        case.x = case.x.clone()
        case.x[:, :5, :2] = math.nan
        y, _ = ssd(*case.arguments(), **case.keywords(), backend=backend)
        later = y[:, 64:]  # where first passes take two chunks at a time, the first segment is of four
        assert later[:, :, 0].isnan().all() and later[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("scores", [False, True])
def test_rows_of_numbers_lie_where_the_copy_engine_can_write(scores: bool) -> None:
    pytest.importorskip("triton")
    from fastmamba.kernels import ssd_portable

    config = configs._portable(torch.device("cpu"), torch.bfloat16, 1, 2048, 8, 64, 128, None)
    for chunk in (16, 32, 64):
        for stages in range(1, 6):
            config = dataclasses.replace(config, chunk=chunk, stages=stages, scores=scores)
            step, ahead = ssd_portable._first_pass(config, 2)
            assert step * torch.float32.itemsize % 128 == 0 and ahead >= 1


@pytest.mark.parametrize("backend", ["triton"])
def test_blocks_dealt_out_by_head(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmamba.kernels import ssd_portable

    monkeypatch.setattr(ssd_portable, "copy_engine", lambda device: True)  # the first pass takes two chunks at a time
    case = ssd_case(2, 525, 4, 16, 2, 16, dtype=torch.bfloat16, device=device, initial=True)
    case.A = torch.tensor(RATES, device=device)
    with configs.override("portable"):
        chosen = configs.ssd_config(device, case.x.dtype, 2, 525, 4, 16, 16, None)
    with configs.override(dataclasses.replace(chosen, chunk=16, stages=4, scores=True, blocks=11)):
        check(case, backend)


def test_dt_may_be_negative_where_its_limits_say_so(backend: str, device: torch.device) -> None:
    case = ssd_case(1, 60, 2, 16, 1, 16, dtype=torch.bfloat16, device=device, dt_softplus=False, dt_limit=(-0.2, 0.2))
    case.A = case.A / 100  # or the state would grow out of all bounds
    with configs.override("portable"):
        check(case, backend)


def test_two_calls_continue_one_another(backend: str, device: torch.device) -> None:
    case = ssd_case(2, 90, 4, 16, 2, 32, device=device, initial=True)
    y, final = ssd(*case.arguments(), **case.keywords(), backend=backend)
    x, dt, A, B, C, D, z, bias, state = case.arguments()
    parts = []
    for part in (slice(0, 37), slice(37, 38), slice(38, 90)):
        step = (x[:, part], dt[:, part], A, B[:, part], C[:, part], D, z, bias, state)
        out, state = ssd(*step, **case.keywords(), backend=backend)
        parts.append(out)
    oracle, final_oracle = case.oracle()
    assert_golden(torch.cat(parts, 1), y, oracle)
    assert_golden(state, final, final_oracle)


def test_a_strong_decay_underflows_without_nan(backend: str, device: torch.device) -> None:
    case = ssd_case(1, 100, 2, 16, 1, 16, device=device, chunk_size=32)
    case.A = case.A * 1e4
    check(case, backend)


def test_inputs_of_any_stride(backend: str, device: torch.device) -> None:
    case = ssd_case(2, 40, 2, 16, 1, 16, device=device, gate=True, initial=True)
    for name in ("x", "B", "C", "z", "dt", "initial_states"):
        value = getattr(case, name)
        spread = torch.full((*value.shape, 3), math.nan, device=device)
        spread[..., 1] = value
        setattr(case, name, spread[..., 1])
    check(case, backend)


def test_float64_on_the_torch_backend_is_the_oracle() -> None:
    case = ssd_case(1, 50, 2, 16, 1, 16, dtype=torch.float64)
    y, final = ssd(*case.to(torch.float64), **case.keywords(), backend="torch")
    y_plain, final_plain = case.plain()
    assert y.dtype == final.dtype == torch.float64
    assert relative_error(y, y_plain) < 1e-13 and relative_error(final, final_plain) < 1e-13


def test_gradients_come_from_the_torch_backend() -> None:
    case = ssd_case(1, 20, 2, 4, 1, 4, dtype=torch.float64)
    inputs = [t.detach().clone().requires_grad_() for t in case.to(torch.float64) if t is not None]

    def run(x, dt, A, B, C, D, bias):  # noqa: ANN001, ANN202
        return ssd(x, dt, A, B, C, D, None, bias, **case.keywords())

    assert torch.autograd.gradcheck(run, inputs)


def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = ssd_case(1, 20, 2, 16, 1, 16, device=device)
    arguments = (*case.arguments(), True, 0.0, math.inf, True, 16, "exact", torch.float32, backend, False)
    torch.library.opcheck(torch.ops.fastmamba.ssd.default, arguments)


def _bad(**changes: object) -> dict[str, object]:
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
    case = ssd_case(2, 8, 4, 16, 2, 16, gate=True, initial=True)
    return {**dict(zip(names, case.arguments(), strict=True)), **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(2, 8, 4)}, "x must have shape"),
        ({"x": "text"}, "x must be a tensor"),
        ({"x": torch.zeros(2, 0, 4, 16)}, "x must not be empty"),
        ({"x": torch.zeros(0, 8, 4, 16)}, "x must not be empty"),
        ({"x": torch.zeros(2, 8, 4, 16, dtype=torch.int32)}, "x must be float16"),
        ({"dt": torch.zeros(2, 8, 3)}, r"dt must have shape \(B, T, H\) = \(2, 8, 4\), got \(2, 8, 3\)"),
        ({"A": torch.zeros(5)}, "A must have shape"),
        ({"A": None}, "A must be a tensor"),
        ({"A": torch.zeros(4, device="meta")}, "A must be on cpu"),
        ({"B": torch.zeros(2, 8, 3, 16)}, "C must have shape"),
        ({"B": torch.zeros(2, 8, 3, 16), "C": torch.zeros(2, 8, 3, 16)}, "groups must divide the 4 heads, got 3"),
        ({"B": torch.zeros(2, 8, 2, 16, dtype=torch.float16)}, "B must have dtype torch.float32"),
        ({"D": torch.zeros(4, 5)}, "D must have shape"),
        ({"z": torch.zeros(2, 8, 4, 15)}, "z must have shape"),
        ({"dt_bias": torch.zeros(3)}, "dt_bias must have shape"),
        ({"initial_states": torch.zeros(2, 4, 16, 8)}, "initial_states must have shape"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit must be"),
        ({"dt_limit": (math.nan, 1.0)}, "dt_limit must be"),
        ({"dt_limit": 3}, "dt_limit must be"),
        ({"chunk_size": 48}, "chunk_size must be"),
        ({"precision": "fast"}, "precision must be one of 'exact', 'relaxed', got 'fast'"),
        ({"state_dtype": torch.float16}, "state_dtype must be"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        ssd(**_bad(**changes))  # type: ignore[arg-type]


def test_bad_input_of_the_triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ssd_case(1, 8, 1, 512, 1, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="P and N up to 256, got P=512"):
        ssd(*case.arguments(), backend="triton")
    with pytest.raises(ValueError, match="backend='triton' takes float16, bfloat16 and float32"):
        ssd(*ssd_case(1, 8, 1, 16, 1, 16).to(torch.float64), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="backend='triton' needs a GPU tensor, got one on cpu"):
        ssd(*ssd_case(1, 8, 1, 16, 1, 16).arguments(), backend="triton")
