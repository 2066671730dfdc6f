"""The fused layer: stepping through a sequence gives what norm, projections, mixer and residual give over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmamba.ops import layer_step
from fastmamba.testing import assert_golden
from tests.ops import test_mixer_step as middle
from tests.ops.test_mixer_step import TOKENS


@dataclass
class Case:
    """A layer's weights around those of a `test_mixer_step.Case`, and the residual stream."""

    x: Tensor  # [B, T, K]
    inner: middle.Case
    linears: tuple[Any, ...]  # in_weight, in_bias, out_weight, out_bias
    norm_weight: Tensor | None
    residual_scale: float | None

    def run(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs and states, by the op."""
        conv_state, state = self.inner.conv_state.clone(), self.inner.state.clone()
        steps = [layer_step(self.x[:, t], conv_state, state, **self.arguments(), **changes) for t in range(TOKENS)]
        return torch.stack(steps, 1), conv_state, state

    def arguments(self) -> dict[str, Any]:
        names = ("conv_weight", "conv_bias", "A_log", "D", "dt_bias")
        return {
            **dict(zip(("in_weight", "in_bias", "out_weight", "out_bias"), self.linears, strict=True)),
            **dict(zip(names, self.inner.weights, strict=True)),
            "groups": self.inner.groups,
            "norm_weight": self.norm_weight,
            "gate_weight": self.inner.norm_weight,
            "residual_scale": self.residual_scale,
        }

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same in plain PyTorch over the sequence, everything in `dtype`."""
        in_weight, in_bias, out_weight, out_bias = (None if w is None else w.to(dtype) for w in self.linears)
        hidden = self.x.to(dtype)
        if self.norm_weight is not None:
            hidden = F.rms_norm(hidden, hidden.shape[-1:], self.norm_weight.to(dtype), 1e-6)
        case = middle.Case(F.linear(hidden, in_weight, in_bias), *list(vars(self.inner).values())[1:])
        y, conv_state, state = case.plain(dtype)
        y = F.linear(y, out_weight, out_bias)
        if self.residual_scale is not None:
            y = self.x.to(torch.promote_types(dtype, self.x.dtype)) + self.residual_scale * y
        return y, conv_state, state


def make(
    size: int = 40,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    residual: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    bias: bool = True,
    norm: bool = True,
    residual_scale: float | None = 0.22,
    **options: Any,
) -> Case:
    inner = middle.make(*shape, dtype=dtype, device=device, bias=bias, **options)
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    batch, heads, head_dim, _ = inner.state.shape
    entries, width = inner.projected.shape[-1], heads * head_dim
    linears = (
        (normal(entries, size) / size**0.5).to(dtype),
        (normal(entries) / 4).to(dtype) if bias else None,
        (normal(size, width) / width**0.5).to(dtype),
        (normal(size) / 4).to(dtype) if bias else None,
    )
    x = normal(batch, TOKENS, size).to(residual or dtype)
    return Case(x, inner, linears, 1 + normal(size) / 4 if norm else None, residual_scale)


def check(case: Case, backend: str) -> None:
    dtype = case.linears[0].dtype
    results = case.run(backend=backend)
    assert results[0].dtype == (dtype if case.residual_scale is None else case.x.dtype)
    assert results[0].shape == case.x.shape
    for actual, plain, oracle in zip(results, case.plain(dtype), case.plain(torch.float64), strict=True):
        assert_golden(actual, plain, oracle)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (40, 1, 2, 16, 1, 16),
        (20, 3, 2, 8, 2, 24),
        pytest.param((2560, 1, 80, 64, 1, 128), marks=pytest.mark.gpu),
        pytest.param((600, 2, 6, 24, 2, 40), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_steps_equal_the_sequence(shape: Any, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(make(*shape, dtype=dtype, device=device), backend)


def test_blocks_of_few_rows(backend: str, device: torch.device) -> None:
    """As a GPU has them."""
    check(make(24, 1, 2, 8, 2, 16, device=device), backend)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 3},
        {"taps": 2, "slots": 4, "bias": False},
        {"norm": False},
        {"gated_norm": False},
        {"residual_scale": None},
        {"norm": False, "residual_scale": None},
        {"dtype": torch.bfloat16, "residual": torch.float32},
        {"dtype": torch.bfloat16, "residual": torch.float32, "residual_scale": None},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    options = dict(options)
    gated = options.pop("gated_norm", True)
    case = make(24, 1, 2, 8, 2, 16, **options, device=device)
    if not gated:
        case.inner.norm_weight = None
    check(case, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_and_overlap(dtype: torch.dtype) -> None:
    """States found through a table, kernels that start early: the same bits, in a graph replayed with other states."""
    case = make(1024, 1, 32, 64, 1, 128, dtype=dtype, residual=torch.float32, device="cuda")
    expected = case.run()
    conv_state, state = case.inner.conv_state.clone(), case.inner.state.clone()
    table = torch.zeros(2, dtype=torch.int64, device="cuda")

    def bind(conv_state: Tensor, state: Tensor) -> None:
        table.copy_(torch.tensor([conv_state.data_ptr(), state.data_ptr()]))

    bind(conv_state, state)
    y, untouched_conv, untouched = case.run(addresses=table, overlap=True)
    assert torch.equal(y, expected[0]) and torch.equal(conv_state, expected[1]) and torch.equal(state, expected[2])
    assert torch.equal(untouched_conv, case.inner.conv_state) and torch.equal(untouched, case.inner.state)

    # Many layers one after the other, so that each kernel has one before it that is still running.
    x = case.x[:, 0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(8):
            y = layer_step(y, conv_state, state, **case.arguments(), addresses=table, overlap=True)
    for _ in range(20):
        conv_state, state = case.inner.conv_state.clone(), case.inner.state.clone()
        bind(conv_state, state)
        graph.replay()
        expected_conv, expected_state, z = case.inner.conv_state.clone(), case.inner.state.clone(), x
        for _ in range(8):
            z = layer_step(z, expected_conv, expected_state, **case.arguments())
        assert torch.equal(y, z) and torch.equal(state, expected_state) and torch.equal(conv_state, expected_conv)


@pytest.mark.usefixtures("few_blocks")
def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = make(24, 1, 2, 8, 2, 16, device=device)
    named = case.arguments()
    names = ("in_weight", "in_bias", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "out_weight", "out_bias")
    arguments = (case.x[:, 0], case.inner.conv_state, case.inner.state, *(named[name] for name in names), 2)
    options = (case.norm_weight, 1e-6, case.inner.norm_weight, 1e-6, 0.5, "silu", None, False, backend)
    torch.library.opcheck(torch.ops.fastmamba.layer_step.default, (*arguments, *options))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(2, 7)}, "in_weight must have shape"),
        ({"in_weight": torch.zeros(7, 40)}, "in_weight must have shape"),
        ({"out_weight": torch.zeros(64, 40)}, "out_weight must have shape"),
        ({"out_bias": torch.zeros(3)}, "out_bias must have shape"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight must have shape"),
        ({"gate_weight": torch.zeros(3)}, "gate_weight must have shape"),
        ({"groups": 3}, "groups must divide the 4 heads, got 3"),
        ({"gate_eps": -1.0}, "gate_eps must be 0 or more"),
        ({"norm_eps": float("nan")}, "norm_eps must be 0 or more"),
        ({"activation": "relu"}, "activation must be"),
        ({"addresses": torch.zeros(2, dtype=torch.int64)}, "addresses needs backend='triton'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], named: str) -> None:
    case = make()
    arguments = {"x": case.x[:, 0], "conv_state": case.inner.conv_state, "state": case.inner.state, "backend": "torch"}
    with pytest.raises(ValueError, match=named):
        layer_step(**{**arguments, **case.arguments(), **changes})


def test_gradients_are_refused() -> None:
    case = make()
    case.linears[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        case.run()
