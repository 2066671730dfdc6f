"""The fused multilayer perceptron and experts against plain PyTorch and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmamba.ops import mlp_step
from fastmamba.reference.mlp_step import mlp_step as reference
from fastmamba.testing import assert_golden

ORDER = ("x", "in_weight", "out_weight", "norm_weight", "norm_eps", "router_weight", "expert_in_weight",
         "expert_out_weight", "top_k", "residual_scale")  # fmt: skip


def make(
    size: int = 40,
    inner: int = 24,
    experts: int = 0,
    expert: int = 12,
    top_k: int = 2,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None,
    norm: bool = True,
    residual_scale: float | None = 0.22,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, by: int = 1) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) / by**0.5).to(dtype)

    return {
        "x": 3 * normal(batch, size).to(residual or dtype),
        "in_weight": normal(2 * inner, size, by=size),
        "out_weight": normal(size, inner, by=inner),
        "norm_weight": 1 + normal(size) / 4 if norm else None,
        "norm_eps": 1e-5,
        "router_weight": normal(experts, size, by=size) if experts else None,
        "expert_in_weight": normal(experts, 2 * expert, size, by=size) if experts else None,
        "expert_out_weight": normal(experts, size, expert, by=expert) if experts else None,
        "top_k": top_k if experts else 0,
        "residual_scale": residual_scale,
    }


def plain(case: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    def to(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value

    return reference(*(to(case[name]) for name in ORDER))


def run(case: dict[str, Any], **changes: Any) -> Tensor:
    arguments = {**case, **changes}
    return mlp_step(arguments.pop("x"), arguments.pop("in_weight"), arguments.pop("out_weight"), **arguments)


def check(case: dict[str, Any], backend: str) -> None:
    actual = run(case, backend=backend)
    assert actual.dtype == (case["in_weight"].dtype if case["residual_scale"] is None else case["x"].dtype)
    assert_golden(actual, plain(case), plain(case, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (40, 24),
        (40, 24, 5, 12, 2),
        (260, 264, 3, 258, 1),
        (24, 17, 8, 9, 8, 3),
        pytest.param((2048, 8192), marks=pytest.mark.gpu),
        pytest.param((1536, 1024, 64, 512, 6), marks=pytest.mark.gpu),
        pytest.param((4096, 1536, 72, 768, 10, 2), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_against_plain(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(make(*shape, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": False},
        {"residual_scale": None},
        {"norm": False, "residual_scale": None, "experts": 0},
        {"dtype": torch.bfloat16, "residual": torch.float32},
        {"dtype": torch.bfloat16, "residual": torch.float32, "residual_scale": None},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    check(make(**{"experts": 5, **options}, device=device), backend)


@pytest.mark.usefixtures("few_blocks")
def test_choice_of_experts(backend: str, device: torch.device) -> None:
    """Rows choose for themselves; equal logits, minus infinity and NaN choose some expert, within bounds."""
    case = make(experts=8, top_k=3, batch=6, device=device)
    alone = torch.cat([run({**case, "x": case["x"][i : i + 1]}, backend=backend) for i in range(6)])
    assert_golden(run(case, backend=backend), plain(case), plain(case, torch.float64))
    torch.testing.assert_close(alone, run(case, backend=backend), rtol=1e-5, atol=1e-5)
    same = {**case, "router_weight": torch.zeros_like(case["router_weight"])}
    for name in ("expert_in_weight", "expert_out_weight"):  # whichever is chosen
        same[name] = same[name][:1].expand_as(same[name]).contiguous()
    check(same, backend)
    case["x"][0, 0] = float("nan")
    assert run(case, backend=backend)[0].isnan().all() and not run(case, backend=backend)[1:].isnan().any()


def test_counter_of_the_callers(backend: str, device: torch.device) -> None:
    """Left as it was found, as is ours: the next call is as good."""
    case = make(size=24, inner=16, experts=6, top_k=3, batch=2, device=device)
    counter = torch.zeros(3, dtype=torch.int32, device=device)
    expected = run(case, backend=backend)
    for _ in range(2):
        assert torch.equal(run(case, counter=counter, backend=backend), expected)
        assert counter.tolist() == [0, 0, 0]
        assert torch.equal(run(case, backend=backend), expected)
    with pytest.raises(ValueError, match="counter must be 2 or more int32 zeros"):
        run(case, counter=counter[:1], backend=backend)


def test_unaligned_weights(backend: str, device: torch.device) -> None:
    case = make(experts=5, device=device)
    for name in ("in_weight", "router_weight", "expert_in_weight", "expert_out_weight"):
        weight = case[name]
        case[name] = torch.empty(weight.numel() + 1, device=device)[1:].view(weight.shape).copy_(weight)
    check(case, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [0, 16])
def test_overlap(experts: int) -> None:
    """Many layers one after the other in a graph, kernels that start early: the same bits."""
    layers = [
        make(1024, 512, experts, 256, 4, dtype=torch.bfloat16, residual=torch.float32, device="cuda", seed=seed)
        for seed in range(6)
    ]

    def through(x: Tensor, **options: Any) -> Tensor:
        for layer in layers:
            x = run({**layer, "x": x}, **options)
        return x

    x = layers[0]["x"].clone()
    options = {"overlap": True, "counter": torch.zeros(1, dtype=torch.int32, device="cuda")}
    through(x, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = through(x, **options)
    for seed in range(20):
        x.copy_(make(1024, dtype=torch.bfloat16, residual=torch.float32, device="cuda", seed=seed)["x"])
        graph.replay()
        assert torch.equal(y, through(x))


def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = make(experts=4, device=device)
    torch.library.opcheck(torch.ops.fastmamba.mlp_step.default, (*(case[name] for name in ORDER), None, False, backend))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(1, 7)}, "out_weight must have shape|in_weight must have shape"),
        ({"in_weight": torch.zeros(7, 40)}, "in_weight must have shape"),
        ({"out_weight": torch.zeros(40, 7)}, "in_weight must have shape"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight must have shape"),
        ({"norm_eps": float("nan")}, "norm_eps must be 0 or more"),
        ({"router_weight": None}, "expert_in_weight needs a router_weight"),
        ({"expert_in_weight": torch.zeros(4, 7, 40)}, "expert_in_weight must have shape"),
        ({"expert_out_weight": torch.zeros(4, 7, 12)}, "expert_out_weight must have shape"),
        ({"top_k": 0}, "top_k must be from 1 to the 4 experts, got 0"),
        ({"top_k": 5}, "top_k must be from 1 to the 4 experts, got 5"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run({**make(experts=4), **changes}, backend="torch")


def test_gradients_are_refused() -> None:
    case = make()
    case["in_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        run(case)
