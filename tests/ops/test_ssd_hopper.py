"""The Hopper variant of the SSD: every form of call it takes, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastmamba.configs import override, ssd_config, ssd_variants
from fastmamba.ops import ssd
from fastmamba.testing import SsdCase, assert_golden, relative_error, ssd_case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if "hopper" not in ssd_variants(torch.device("cuda", 0)):
        pytest.skip("needs an H100 or H200")


def aligned(case: SsdCase) -> SsdCase:
    """A gate in rows of a multiple of 16 bytes, as every model has them; an odd number of heads here breaks that."""
    if case.z is not None:
        case.z = case.z.contiguous()
    return case


def random_case(seed: int) -> SsdCase:
    draw = random.Random(seed)
    groups = draw.choice((1, 1, 2, 4))
    case = ssd_case(
        batch=draw.choice((1, 1, 2, 3)),
        tokens=draw.choice((1, 2, 31, 63, 64, 65, 128, 200, 511, 1000, 2500)),
        heads=groups * draw.choice((1, 2, 3, 5, 8)),
        head_dim=draw.choice((64, 64, 128)),
        groups=groups,
        state=draw.choice((64, 128, 128, 256)),
        dtype=draw.choice((torch.float16, torch.bfloat16)),
        device="cuda",
        seed=seed,
        per_channel_d=draw.random() < 0.3,
        skip=draw.random() < 0.7,
        gate=draw.random() < 0.4,
        bias=draw.random() < 0.8,
        initial=draw.random() < 0.5,
        dt_softplus=draw.random() < 0.8,
        dt_limit=draw.choice(((0.0, float("inf")), (0.0, float("inf")), (0.01, 0.1), (0.001, float("inf")))),
    )
    return aligned(case)


def run(case: SsdCase, segments: int | None = None, **keywords: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The Hopper variant; `segments` overrules how many parts the sequence is split into."""
    batch, tokens, heads, head_dim = case.x.shape
    groups, state = case.B.shape[2:]
    config = ssd_config(case.x.device, case.x.dtype, batch, tokens, heads, head_dim, state, None, groups=groups)
    assert config.variant == "hopper"
    if segments is not None:
        config = dataclasses.replace(config, segments=segments)
    # what an output that is not written would hold
    poison = [torch.full_like(case.x, torch.nan) for _ in range(2)]
    del poison
    with override(config):
        return ssd(*case.arguments(), **case.keywords(), backend="triton", **keywords)  # type: ignore[arg-type]


def check(case: SsdCase, segments: int | None = None) -> None:
    y, final = run(case, segments)
    assert y.dtype == case.x.dtype and y.is_contiguous() and final.dtype == torch.float32
    (y_oracle, final_oracle), (y_plain, final_plain) = case.oracle(), case.plain()
    assert_golden(y, y_plain, y_oracle, what=f"y of {case}")
    assert_golden(final, final_plain, final_oracle, what=f"final states of {case}")


@pytest.mark.parametrize("seed", range(60))
def test_random_cases(seed: int) -> None:
    check(random_case(seed))


@pytest.mark.parametrize("segments", [2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_split_sequences(segments: int, dtype: torch.dtype) -> None:
    check(aligned(ssd_case(2, 999, 3, 64, 1, 128, dtype=dtype, device="cuda", initial=True, gate=True)), segments)


@pytest.mark.parametrize(("heads", "head_dim", "slices"), [(3, 64, 1), (3, 64, 2), (2, 128, 2)])
@pytest.mark.parametrize(("segments", "tokens"), [(2, 1500), (3, 2400), (4, 4200), (5, 2810)])
def test_blocks_share_the_first_pass(segments: int, tokens: int, heads: int, head_dim: int, slices: int) -> None:
    # at least four chunks of a segment for each segment; with one slice nine are enough
    case = ssd_case(1, tokens, heads, head_dim, 1, 128, dtype=torch.bfloat16, device="cuda", initial=True)
    case.A = case.A / 100  # so that what is handed over matters
    config = ssd_config(case.x.device, case.x.dtype, 1, tokens, heads, head_dim, 128, None)
    config = dataclasses.replace(config, segments=segments, block_slices=slices, stages=3 if slices == 2 else 4)
    with override(config):
        results = ssd(*case.arguments(), **case.keywords(), backend="triton")
    for result, plain, oracle in zip(results, case.plain(), case.oracle(), strict=True):
        assert_golden(result, plain, oracle)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "groups", "slices", "segments", "available"),
    [(1, 5, 64, 1, 2, 3, 10), (2, 10, 64, 2, 2, 2, 28), (1, 6, 128, 1, 2, 3, 20), (2, 4, 128, 2, 2, 2, 19),
     (1, 12, 64, 1, 1, 3, 40)],
    ids=["a slice over", "in two groups", "two slices of a head", "heads in two groups", "one slice"],
)  # fmt: skip
def test_leaders_walk_the_first_chunks(
    batch: int, heads: int, head_dim: int, groups: int, slices: int, segments: int, available: int, gated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fastmamba import ssd_plan
    from fastmamba.kernels import ssd_hopper

    monkeypatch.setattr(ssd_hopper, "multiprocessors", lambda device: available)  # so that there are more slices each
    tokens = 4333
    planned = ssd_plan.plan(batch, groups, heads * head_dim // 64 // groups, 68, segments, slices, available)
    assert planned.leaders and planned.pieces > 2
    case = aligned(
        ssd_case(
            batch, tokens, heads, head_dim, groups, 128, dtype=torch.bfloat16, device="cuda", initial=True, gate=gated,
            per_channel_d=gated,
        )
    )  # fmt: skip
    case.A = case.A / 100  # so that the state before a segment matters
    config = ssd_config(case.x.device, case.x.dtype, batch, tokens, heads, head_dim, 128, None, groups=groups)
    config = dataclasses.replace(config, segments=segments, block_slices=slices, stages=3 if slices == 2 else 4)
    with override(config):
        results = [ssd(*case.arguments(), **case.keywords(), backend="triton") for _ in range(3)]
    assert all(torch.equal(mine, its) for other in results[1:] for mine, its in zip(results[0], other, strict=True))
    for result, plain, oracle in zip(results[0], case.plain(), case.oracle(), strict=True):
        assert_golden(result, plain, oracle)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "groups", "segments", "available"),
    [(1, 7, 64, 1, 3, 17), (2, 10, 64, 2, 2, 28), (1, 3, 128, 1, 3, 40)],
    ids=["a slice over", "in two groups", "two slices of a head"],
)
def test_segments_of_a_state_of_256_are_dealt_out(
    batch: int, heads: int, head_dim: int, groups: int, segments: int, available: int, gated: bool,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    from fastmamba import ssd_plan
    from fastmamba.kernels import ssd_hopper

    monkeypatch.setattr(ssd_hopper, "multiprocessors", lambda device: available)  # so that there are more slices each
    request.addfinalizer(ssd_plan.plan.cache_clear)  # whatever becomes of this test
    monkeypatch.setattr(ssd_plan, "_WIDE_LEAST", 4)
    ssd_plan.plan.cache_clear()
    slices = heads * head_dim // 64 // groups
    planned = ssd_plan.plan(batch, groups, slices, 68, segments, 2, available, wide=True, gated=gated)
    assert planned.dealt == available // batch
    options = {"initial": True, "gate": gated, "per_channel_d": gated}
    case = ssd_case(batch, 4333, heads, head_dim, groups, 256, dtype=torch.bfloat16, device="cuda", **options)
    case = aligned(case)
    case.A = torch.cat((case.A[:1], case.A[1:-1] / 100, case.A[-1:] * 3))  # the state before matters, or not
    config = ssd_config(case.x.device, case.x.dtype, batch, 4333, heads, head_dim, 256, None, groups=groups)
    with override(dataclasses.replace(config, segments=segments)):
        results = [ssd(*case.arguments(), **case.keywords(), backend="triton") for _ in range(3)]
    assert all(torch.equal(mine, its) for other in results[1:] for mine, its in zip(results[0], other, strict=True))
    for result, plain, oracle in zip(results[0], case.plain(), case.oracle(), strict=True):
        assert_golden(result, plain, oracle)


@pytest.mark.parametrize("per_channel", [False, True], ids=["", "D of each channel"])
@pytest.mark.parametrize(
    ("batch", "heads", "head_dim", "groups", "segments", "available"),
    [(1, 7, 64, 1, 3, 14), (2, 10, 64, 2, 2, 28), (1, 5, 128, 1, 3, 18)],
    ids=["a slice over", "in two groups", "two slices of a head"],
)
def test_leads_dealt_out_by_head(
    batch: int, heads: int, head_dim: int, groups: int, segments: int, available: int, per_channel: bool,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    from fastmamba import ssd_plan
    from fastmamba.kernels import _leads, ssd_hopper

    monkeypatch.setattr(ssd_hopper, "multiprocessors", lambda device: available)
    request.addfinalizer(ssd_plan.plan.cache_clear)  # whatever becomes of this test
    monkeypatch.setattr(ssd_plan, "_DEALT", 4)
    monkeypatch.setattr(ssd_plan, "_DEALT_WORTH", 9.0)  # leads differ, whatever that gains
    monkeypatch.setattr(_leads, "_APART", 0 if per_channel else 512)  # both ways to launch what comes before
    ssd_plan.plan.cache_clear()
    slices = heads * head_dim // 64 // groups
    planned = ssd_plan.plan(batch, groups, slices, 98, segments, 2, available)
    assert planned.unit and planned.leaders > 1
    options = {"initial": True, "per_channel_d": per_channel}
    case = ssd_case(batch, 6233, heads, head_dim, groups, 128, dtype=torch.bfloat16, device="cuda", **options)
    case = aligned(case)
    # What is far back matters, or nothing does but the last chunk; one head grows.
    rates = torch.tensor([0.01, 100.0, 1.0, 5.0, -1e-4], device="cuda")
    case.A = case.A * rates[torch.arange(heads, device="cuda") % 5]
    config = ssd_config(case.x.device, case.x.dtype, batch, 6233, heads, head_dim, 128, None, groups=groups)
    config = dataclasses.replace(config, segments=segments, block_slices=2, stages=3)
    with override(config):
        results = [ssd(*case.arguments(), **case.keywords(), backend="triton") for _ in range(3)]
    assert all(torch.equal(mine, its) for other in results[1:] for mine, its in zip(results[0], other, strict=True))
    for result, plain, oracle in zip(results[0], case.plain(), case.oracle(), strict=True):
        assert_golden(result, plain, oracle)


@pytest.mark.parametrize(
    ("heads", "head_dim", "state", "slices", "segments"),
    [(3, 64, 128, 2, 20), (3, 64, 64, 1, 17), (2, 128, 128, 2, 18), (3, 64, 256, 2, 17)],
    ids=["a slice over", "one slice", "two slices of a head", "a state of 256"],
)
def test_repeated_calls_are_bit_identical(heads: int, head_dim: int, state: int, slices: int, segments: int) -> None:
    # more segments than look back to one: some hand on whole states
    case = ssd_case(2, 64 * 2 * segments, heads, head_dim, 1, state, dtype=torch.bfloat16, device="cuda", initial=True)
    case.A = case.A / 100  # so that what is handed over matters
    config = ssd_config(case.x.device, case.x.dtype, 2, case.x.shape[1], heads, head_dim, state, None)
    config = dataclasses.replace(config, segments=segments, block_slices=slices, stages=3 if slices == 2 else 4)
    with override(config):
        first = ssd(*case.arguments(), **case.keywords(), backend="triton")
        others = [ssd(*case.arguments(), **case.keywords(), backend="triton") for _ in range(30)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ssd(*case.arguments(), **case.keywords(), backend="triton")
        for _ in range(10):  # each finds its flags as the one before has left them
            for result in captured:
                result.fill_(torch.nan)
            graph.replay()
            others.append(tuple(result.clone() for result in captured))
    for other in others:
        assert all(torch.equal(mine, its) for mine, its in zip(first, other, strict=True))
    for result, plain, oracle in zip(first, case.plain(), case.oracle(), strict=True):
        assert_golden(result, plain, oracle)


@pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("heads, head_dim, groups", [(3, 64, 1), (2, 128, 1), (6, 64, 2)])
@pytest.mark.parametrize(("segments", "tokens"), [(1, 999), (2, 999), (7, 999), (3, 2400)])
def test_a_state_of_256(segments: int, tokens: int, heads: int, head_dim: int, groups: int, gated: bool) -> None:
    case = ssd_case(
        2, tokens, heads, head_dim, groups, 256, dtype=torch.bfloat16, device="cuda", initial=True, gate=gated
    )
    case.A = case.A / 100  # so that what is handed over matters
    check(aligned(case), segments)


def test_more_blocks_than_the_gpu_holds_at_once() -> None:
    case = ssd_case(2, 2000, 40, 64, 1, 128, dtype=torch.bfloat16, device="cuda", initial=True)
    check(case, 9)


def test_the_variants_agree() -> None:
    case = ssd_case(1, 5000, 80, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    y, final = run(case)
    with override("portable"):
        other_y, other_final = ssd(*case.arguments(), **case.keywords(), backend="triton")
    assert relative_error(y, other_y) < torch.finfo(torch.bfloat16).eps
    assert relative_error(final, other_final) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_relaxed_precision_costs_a_few_roundings(dtype: torch.dtype) -> None:
    case = ssd_case(1, 500, 4, 64, 1, 128, dtype=dtype, device="cuda")
    oracle, _ = case.oracle()
    exact, relaxed = (run(case, precision=precision)[0] for precision in ("exact", "relaxed"))
    assert not torch.equal(relaxed, exact)
    assert relative_error(relaxed, oracle) <= 3 * relative_error(exact, oracle)


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("state", [128, 256])
def test_handing_states_over_in_half_precision(segments: int, state: int) -> None:
    case = ssd_case(1, 999, 2, 64, 1, state, dtype=torch.bfloat16, device="cuda")
    case.A = case.A / 100  # so that what is handed over matters
    oracle, _ = case.oracle()
    exact, half = (run(case, segments, state_dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact, half) == (segments == 1)
    assert relative_error(half, oracle) <= 2 * relative_error(exact, oracle)


@pytest.mark.parametrize("per_channel", [False, True], ids=["D of a head", "D of a channel"])
def test_what_a_token_adds_to_its_own_output_is_rounded_once(per_channel: bool) -> None:
    case = ssd_case(8, 1, 6, 64, 1, 128, dtype=torch.bfloat16, device="cuda", per_channel_d=per_channel)
    oracle, _ = case.oracle()
    assert (run(case)[0] == oracle.to(torch.bfloat16)).double().mean() > 0.99


def test_a_strong_decay_underflows_without_nan() -> None:
    case = ssd_case(1, 300, 2, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    case.A = case.A * 1e4
    check(case)


def test_x_that_the_copy_engine_cannot_read_is_copied() -> None:
    case = ssd_case(1, 100, 2, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    spread = torch.full((*case.x.shape, 2), torch.nan, device="cuda", dtype=torch.bfloat16)
    spread[..., 0] = case.x
    case.x = spread[..., 0]
    check(case)


def test_a_gate_that_the_copy_engine_cannot_read_goes_to_the_portable_kernel() -> None:
    case = ssd_case(1, 100, 2, 64, 1, 128, dtype=torch.bfloat16, device="cuda", gate=True)
    assert case.z is not None
    spread = torch.full((*case.z.shape, 2), torch.nan, device="cuda", dtype=torch.bfloat16)
    spread[..., 0] = case.z
    case.z = spread[..., 0]
    y, final = ssd(*case.arguments(), **case.keywords(), backend="triton")
    (y_oracle, final_oracle), (y_plain, final_plain) = case.oracle(), case.plain()
    assert_golden(y, y_plain, y_oracle)
    assert_golden(final, final_plain, final_oracle)
    with override("hopper"), pytest.raises(ValueError, match="variant 'hopper' of the SSD does not cover this call"):
        ssd(*case.arguments(), **case.keywords(), backend="triton")
