"""The fused one-token step: stepping through a sequence gives what convolution, recurrence and norm give over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmamba.ops import mixer_step
from fastmamba.reference.recurrence import ssd_recurrence
from fastmamba.testing import assert_golden

TOKENS = 4


@dataclass
class Case:
    """Weights, a few projections and the states before them."""

    projected: Tensor  # [B, T, 2*D + 2*G*N + H], a strided view
    conv_state: Tensor
    state: Tensor
    weights: tuple[Any, ...]  # conv_weight, conv_bias, A_log, D, dt_bias
    groups: int
    norm_weight: Tensor | None
    group_size: int | None
    gate: str

    def options(self) -> dict[str, Any]:
        return {
            "groups": self.groups,
            "norm_weight": self.norm_weight,
            "group_size": self.group_size,
            "gate": self.gate,
        }

    def run(self, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs and states, by the op."""
        conv_state, state = self.conv_state.clone(), self.state.clone()
        steps = [
            mixer_step(self.projected[:, t], conv_state, state, *self.weights, **self.options(), **changes)
            for t in range(TOKENS)
        ]
        return torch.stack(steps, 1), conv_state, state

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The same in plain PyTorch over the sequence, everything in `dtype`."""
        conv_weight, conv_bias, A_log, D, dt_bias = (None if w is None else w.to(dtype) for w in self.weights)
        batch, heads, head_dim, width = self.state.shape
        inner, taps, slots = heads * head_dim, conv_weight.shape[1], self.conv_state.shape[2]
        z, xbc, dt = self.projected.to(dtype).split((inner, conv_weight.shape[0], heads), -1)
        inputs = torch.cat([self.conv_state.to(dtype), xbc.transpose(1, 2)], -1)
        conv = F.conv1d(inputs[..., -(TOKENS + taps - 1) :], conv_weight[:, None], conv_bias, groups=len(conv_weight))
        x, B, C = F.silu(conv).transpose(1, 2).split((inner, self.groups * width, self.groups * width), -1)
        x, B, C = x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (-1, width)), C.unflatten(-1, (-1, width))
        states = self.state.to(dtype) if dtype == torch.float64 else self.state
        y, final = ssd_recurrence(
            x, dt, -A_log.exp(), B, C, D, None, dt_bias, states, True, -torch.inf, torch.inf, compute_dtype=dtype
        )
        y = y.flatten(2)
        if self.gate == "before":
            y = y * F.silu(z)
        if self.norm_weight is not None:
            y = F.rms_norm(y.unflatten(-1, (-1, self.group_size or inner)), (self.group_size or inner,), None, 1e-6)
            y = y.flatten(2) * self.norm_weight.to(dtype)
        if self.gate == "after":
            y = y * F.silu(z)
        return y, inputs[..., -slots:], final


def make(
    batch: int = 2,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    taps: int = 4,
    slots: int = 4,
    bias: bool = True,
    norm: bool = True,
    group_size: int | None = None,
    gate: str = "before",
    seed: int = 0,
) -> Case:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    inner = heads * head_dim
    channels = inner + 2 * groups * width
    row = inner + channels + heads
    weights = (
        normal(channels, taps) / 2,
        normal(channels) / 2 if bias else None,
        normal(heads).abs().log1p(),
        normal(heads),
        normal(heads) - 3,
    )
    return Case(
        normal(batch, TOKENS, row + 3).to(dtype)[..., :row],
        normal(batch, channels, slots).to(dtype),
        normal(batch, heads, head_dim, width),
        weights,
        groups,
        1 + normal(inner) / 4 if norm else None,
        group_size,
        gate,
    )


def check(case: Case, backend: str) -> None:
    results = case.run(backend=backend)
    assert results[0].dtype == case.projected.dtype and results[0].is_contiguous()
    for actual, plain, oracle in zip(results, case.plain(case.projected.dtype), case.plain(torch.float64), strict=True):
        assert_golden(actual, plain, oracle)
    assert torch.equal(results[1], case.plain(case.projected.dtype)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 64, 1, 128), (2, 6, 24, 2, 40), (2, 2, 80, 2, 24), (1, 3, 8, 3, 16)], ids=str)
def test_steps_equal_the_sequence(shape: Any, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(make(*shape, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 3},
        {"slots": 6},
        {"taps": 2, "slots": 2},
        {"taps": 3, "slots": 4, "bias": False},
        {"gate": "after"},
        {"norm": False},
        {"norm": False, "gate": "none"},
        {"group_size": 32},
        {"group_size": 16, "gate": "after"},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    check(make(1, **options, device=device), backend)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_state(state_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """It is what rounding the float32 state after each token gives: within one rounding of the state."""
    case = make(dtype=torch.bfloat16, device=device)
    case.state = case.state.to(state_dtype)
    y, _, state = case.run(backend=backend)
    assert state.dtype == state_dtype
    exact = case.plain(torch.float64)
    eps = torch.finfo(state_dtype).eps
    assert (state.double() - exact[2]).norm() <= TOKENS**0.5 * eps * exact[2].norm()
    assert (y.double() - exact[0]).norm() <= 4 * torch.finfo(torch.bfloat16).eps * exact[0].norm()


@pytest.mark.parametrize("gate", ["before", "after"])
def test_output_beyond_float16(gate: str, backend: str, device: torch.device) -> None:
    """The norm takes what float16 could not hold."""
    case = make(dtype=torch.float16, device=device, gate=gate)
    case.state *= 1e5
    oracle = case.plain(torch.float64)[0]
    assert_golden(case.run(backend=backend)[0], oracle.half(), oracle)
    case.norm_weight, case.gate = None, "none"
    assert case.plain(torch.float64)[0].abs().amax() > 2 * torch.finfo(torch.float16).max


def test_strided_states(backend: str, device: torch.device) -> None:
    """Only what belongs to the states is written."""
    case = make(device=device)
    expected = case.run(backend=backend)
    memory = torch.full((2, 5, *case.state.shape[1:]), torch.nan, device=device)
    inputs = torch.full((2, 5, *case.conv_state.shape[1:]), torch.nan, device=device)
    memory[:, 2], inputs[:, 2] = case.state, case.conv_state
    for t in range(TOKENS):
        mixer_step(case.projected[:, t], inputs[:, 2], memory[:, 2], *case.weights, **case.options(), backend=backend)
    assert torch.equal(memory[:, 2], expected[2]) and torch.equal(inputs[:, 2], expected[1])
    for tensor in (memory, inputs):
        assert tensor[:, [0, 1, 3, 4]].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 80, 64, 1, 128), (8, 48, 64, 1, 128), (128, 8, 64, 1, 128)], ids=str)
def test_addresses(shape: Any, dtype: torch.dtype) -> None:
    """States found through a table of addresses get the same bits, those given in the call stay as they are."""
    case = make(*shape, dtype=dtype, device="cuda")
    expected = case.run()
    conv_state, state = case.conv_state.clone(), case.state.clone()
    addresses = torch.tensor([conv_state.data_ptr(), state.data_ptr()], device="cuda")
    y, untouched_conv, untouched = case.run(addresses=addresses)
    assert torch.equal(y, expected[0]) and torch.equal(conv_state, expected[1]) and torch.equal(state, expected[2])
    assert torch.equal(untouched_conv, case.conv_state) and torch.equal(untouched, case.state)


@pytest.mark.gpu
def test_no_race() -> None:
    """Many heads share the inputs of B and C: the same call gives the same bits each time."""
    case = make(2, 128, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    first = case.run()
    for _ in range(50):
        for expected, actual in zip(first, case.run(), strict=True):
            assert torch.equal(actual, expected)


def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = make(device=device)
    arguments = (case.projected[:, 0], case.conv_state, case.state, *case.weights, 2, case.norm_weight, 1e-6, 64)
    torch.library.opcheck(torch.ops.fastmamba.mixer_step.default, (*arguments, "before", "silu", None, backend))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projected": torch.zeros(2, 7)}, "projected must have shape"),
        ({"state": torch.zeros(2, 4, 16)}, "state must have shape"),
        ({"conv_state": torch.zeros(2, 128, 2)}, "conv_state must hold at least W - 1 = 3 inputs, got 2"),
        ({"groups": 3}, "groups must divide the 4 heads, got 3"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"gate": "never"}, "gate must be one of 'before', 'after', 'none', got 'never'"),
        ({"gate": "none"}, "got 'none'"),
        ({"group_size": 7}, "group_size must divide D = 64, got 7"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"activation": "relu"}, "activation must be"),
        ({"addresses": torch.zeros(2, dtype=torch.int64)}, "addresses needs backend='triton'"),
        ({"addresses": torch.zeros(3, dtype=torch.int64)}, "addresses must have shape"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], named: str) -> None:
    case = make()
    names = ("conv_weight", "conv_bias", "A_log", "D", "dt_bias")
    arguments = {
        "projected": case.projected[:, 0],
        "conv_state": case.conv_state,
        "state": case.state,
        **dict(zip(names, case.weights, strict=True)),
        **case.options(),
        "backend": "torch",
    }
    with pytest.raises(ValueError, match=named):
        mixer_step(**{**arguments, **changes})


def test_gradients_are_refused() -> None:
    case = make()
    case.norm_weight.requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        case.run()
