"""Experts on many tokens against plain PyTorch and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmamba.ops import moe
from fastmamba.reference.moe import moe as reference
from fastmamba.testing import assert_golden

ORDER = ("x", "router_weight", "in_weight", "out_weight", "top_k", "add")


def make(
    batch: int = 1,
    tokens: int = 9,
    size: int = 40,
    width: int = 24,
    experts: int = 5,
    top_k: int = 2,
    *,
    add: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs whose logits are multiples of 1/16, all different in a token: every dtype chooses the same experts."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, by: int = 1) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) / by**0.5).to(dtype)

    x = normal(batch, tokens, size)
    ranks = torch.rand(batch, tokens, experts, device=device, generator=generator).argsort(-1)
    x[..., :experts] = (ranks / 16 - experts / 32).to(dtype)
    return {
        "x": x,
        "router_weight": torch.eye(experts, size, device=device, dtype=dtype),
        "in_weight": normal(experts, 2 * width, size, by=size),
        "out_weight": normal(experts, size, width, by=width),
        "top_k": top_k,
        "add": normal(batch, tokens, size) if add else None,
    }


def plain(case: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    values = [case[name] for name in ORDER]
    return reference(*(v.to(dtype) if isinstance(v, Tensor) and dtype is not None else v for v in values))


def run(case: dict[str, Any], **changes: Any) -> Tensor:
    arguments = {**case, **changes}
    weights = [arguments.pop(name) for name in ORDER[:4]]
    return moe(*weights, **arguments)


def check(case: dict[str, Any], backend: str) -> Tensor:
    actual = run(case, backend=backend)
    assert actual.dtype == case["x"].dtype and actual.shape == case["x"].shape and actual.is_contiguous()
    # Triton's interpreter cuts off instead of rounding bfloat16, which errs twice as much.
    cut = backend == "triton" and actual.is_cpu and actual.dtype == torch.bfloat16
    half = actual.is_cuda and actual.dtype != torch.float32  # rounded less often than in plain PyTorch
    assert_golden(actual, plain(case), plain(case, torch.float64), 3.0 if cut else 1.1 if half else 2.0)
    return actual


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 40, 24, 5, 2), (1, 1, 32, 20, 17, 1)], ids=str)
def test_against_plain(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(make(*shape, dtype=dtype, device=device), backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 17, 1536, 512, 64, 6), torch.bfloat16),
        ((2, 333, 1536, 512, 64, 6), torch.bfloat16),
        ((2, 333, 1536, 512, 64, 6), torch.float16),
        ((2, 333, 1536, 512, 64, 6), torch.float32),
        ((1, 9000, 1536, 512, 64, 6), torch.bfloat16),
        ((1, 3000, 4096, 768, 72, 10), torch.bfloat16),
        ((1, 700, 520, 136, 100, 7), torch.bfloat16),
        ((1, 700, 514, 133, 9, 9), torch.bfloat16),
        ((1, 700, 514, 133, 9, 9), torch.float32),
    ],
    ids=str,
)
def test_sizes_of_models(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make(*shape, dtype=dtype, device="cuda")
    actual = check(case, "triton")
    for _ in range(3):
        assert torch.equal(run(case), actual)  # the same bits again


def test_without_what_is_added(backend: str, device: torch.device) -> None:
    case = make(add=False, device=device)
    case["x"] = case["x"].mT.contiguous().mT  # strides of another kind
    check(case, backend)


def test_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What many tokens take, with few."""
    pytest.importorskip("triton")
    monkeypatch.setattr("fastmamba.kernels.moe._FEW_BLOCKS", 1)
    monkeypatch.setattr("fastmamba.kernels.moe._MOST_TOKENS", 20)
    case = make(tokens=37, device="cuda" if torch.cuda.is_available() else "cpu")  # 19 and 18 at a time
    rest = {name: case[name][:, 19:] for name in ("x", "add")}
    assert torch.equal(check(case, "triton")[:, 19:], run(case, **rest, backend="triton"))


@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
def test_blocks_fit_into_shared_memory(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fastmamba.kernels import moe as kernel

    monkeypatch.setattr(kernel, "shared_bytes", lambda device: shared)
    for dtype, slots in itertools.product(DTYPES, (6, 600, 60_000)):
        up, down = kernel._tiles(slots, 20, torch.empty(0, dtype=dtype))
        for tile, weights in ((up, 2), (down, 1)):
            numbers = tile.stages * tile.depth * (tile.rows + weights * tile.columns)
            assert numbers * dtype.itemsize <= shared - 1024 and tile.columns >= 32 <= tile.depth


def test_uneven_experts(backend: str, device: torch.device) -> None:
    """One expert gets every token, others none."""
    case = make(tokens=18, experts=6, top_k=2, device=device)
    case["x"][..., 3] = 4.0
    case["x"][..., :3] = torch.tensor([1.0, -2.0, -2.5], device=device)
    case["x"][..., 4:6] = torch.tensor([-3.0, -3.5], device=device)
    check(case, backend)
    alone = {**case, "top_k": 1}
    check(alone, backend)


def test_equal_infinite_and_missing_logits(backend: str, device: torch.device) -> None:
    """Of equal logits the lower expert's count; what is not a number stays with its token."""
    case = make(tokens=6, experts=4, top_k=2, add=False, device=device)
    expected = run(case, backend=backend)
    same = {**case, "router_weight": torch.zeros_like(case["router_weight"])}
    if backend == "triton":  # PyTorch does not say which it takes
        two = {name: case[name][:2] for name in ("in_weight", "out_weight")}
        first = run({**same, **two, "router_weight": same["router_weight"][:2]}, backend=backend)
        torch.testing.assert_close(run(same, backend=backend), first)
    case["x"][0, 1] = float("nan")
    case["x"][0, 2] = float("-inf")
    found = run(case, backend=backend)
    assert found[0, 1].isnan().all() and found[0, 2].isnan().all()
    kept = [0, 3, 4, 5]
    torch.testing.assert_close(found[0, kept], expected[0, kept])


@pytest.mark.gpu
@pytest.mark.parametrize("pieces", [False, True])
def test_more_tokens_than_32_bits_address(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pieces:
        monkeypatch.setattr("fastmamba.kernels.moe._MOST_TOKENS", 1 << 20)
    case = make(1, 180_000, 2048, 16, 8, 8, add=False, dtype=torch.bfloat16, device="cuda")  # 2.9e9 slots of channels
    found = run(case)
    few = {**case, "x": case["x"][:, -1000:].contiguous()}
    torch.testing.assert_close(found[:, -1000:], run(few), rtol=2e-2, atol=1e-2)


def test_gradients_go_through_plain_pytorch(backend: str, device: torch.device) -> None:
    case = make(tokens=5, device=device)
    case["in_weight"].requires_grad_()
    run(case, backend=backend).sum().backward()
    assert case["in_weight"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(9, 40)}, r"x must have shape \(B, T, K\)"),
        ({"router_weight": torch.zeros(5, 41)}, "router_weight must have shape"),
        ({"in_weight": torch.zeros(5, 24, 40)}, "in_weight must have shape"),
        ({"out_weight": torch.zeros(5, 40, 24, dtype=torch.float16)}, "out_weight must have dtype"),
        ({"add": torch.zeros(1, 8, 40)}, "add must have shape"),
        ({"top_k": 0}, "top_k must be from 1 to the 5 experts, got 0"),
        ({"top_k": 6}, "top_k must be from 1 to the 5 experts, got 6"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run(make(), **changes, backend="torch")


def test_strides_of_weights_are_named() -> None:
    pytest.importorskip("triton")
    case = make()
    with pytest.raises(ValueError, match="out_weight must be contiguous"):
        run(case, out_weight=case["out_weight"].mT.contiguous().mT, backend="triton")
