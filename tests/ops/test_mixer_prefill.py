"""All between a mixer's projections: what plain PyTorch computes one after the other, whatever the options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmamba.ops import mixer_prefill
from fastmamba.reference.recurrence import ssd_recurrence
from fastmamba.testing import assert_golden


@dataclass
class Case:
    """Arguments of `mixer_prefill`."""

    projected: Tensor  # [B, T, 2*D + 2*G*N + H], a strided view
    weights: dict[str, Any]
    head_dim: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **changes: Any) -> tuple[Tensor, Tensor]:
        """Outputs and final states, by the op."""
        arguments: dict[str, Any] = {**self.weights, **self.options, "return_final_states": True, **changes}
        return mixer_prefill(self.projected, **arguments)  # pyrefly: ignore[bad-return]

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same in plain PyTorch, everything in `dtype`."""
        given = {**self.weights, **self.options}
        tensors = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in given.items()}
        weight, groups = tensors["conv_weight"], tensors["groups"]
        (channels, taps), heads = weight.shape, len(tensors["A_log"])
        inner = heads * self.head_dim
        width = (channels - inner) // (2 * groups)
        z, xbc, dt = self.projected.to(dtype).split((inner, channels, heads), -1)
        before = tensors.get("initial_conv")
        if before is None:
            before = xbc.new_zeros(xbc.shape[0], channels, taps - 1)
        inputs = torch.cat([before, xbc.transpose(1, 2)], -1)
        conv = F.silu(F.conv1d(inputs, weight[:, None], tensors["conv_bias"], groups=channels)).transpose(1, 2)
        if tensors.get("mask") is not None:
            conv = conv * tensors["mask"][:, :, None]
        x, B, C = conv.split((inner, groups * width, groups * width), -1)
        x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
        A = -tensors["A_log"].exp()
        rest = (True, *tensors.get("dt_limit", (0.0, math.inf)))
        y, final = ssd_recurrence(
            x, dt, A, B, C, tensors["D"], None, tensors["dt_bias"], tensors.get("initial_states"), *rest,
            compute_dtype=dtype,
        )  # fmt: skip
        y, gate, norm = y.flatten(2), tensors.get("gate", "before"), tensors.get("norm_weight")
        if gate == "before":
            y = y * F.silu(z)
        if norm is not None:
            size = tensors.get("group_size") or inner
            y = F.rms_norm(y.unflatten(-1, (-1, size)), (size,), None, 1e-6).flatten(2) * norm
        if gate == "after":
            y = y * F.silu(z)
        return y, final


def make(
    batch: int = 2,
    tokens: int = 40,
    heads: int = 4,
    head_dim: int = 16,
    groups: int = 2,
    width: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = True,
    norm: bool = True,
    initial: bool = False,
    mask: bool = False,
    taps: int = 4,
    seed: int = 0,
    **options: Any,
) -> Case:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    inner = heads * head_dim
    channels = inner + 2 * groups * width
    row = inner + channels + heads
    weights = {
        "conv_weight": (normal(channels, taps) / 2).to(dtype),
        "conv_bias": (normal(channels) / 2).to(dtype) if bias else None,
        "A_log": (normal(heads).abs() * 16).log1p(),
        "D": normal(heads),
        "dt_bias": normal(heads) - 3,
        "groups": groups,
        "norm_weight": 1 + normal(inner) / 4 if norm else None,
    }
    if initial:
        options["initial_conv"] = normal(batch, channels, taps - 1).to(dtype)
        options["initial_states"] = normal(batch, heads, head_dim, width)
    if mask:
        options["mask"] = (normal(batch, tokens) > 0).to(torch.int64)
    projected = normal(batch, tokens, row + 8).to(dtype)[..., :row]
    return Case(projected, weights, head_dim, options)


def check(case: Case, backend: str) -> None:
    results = case.run(backend=backend)
    assert results[0].dtype == case.projected.dtype and results[0].is_contiguous()
    for actual, plain, oracle in zip(results, case.plain(case.projected.dtype), case.plain(torch.float64), strict=True):
        assert_golden(actual, plain, oracle)
    bare = case.run(backend=backend, return_final_states=False)
    assert torch.equal(bare, results[0])  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 2, 64, 1, 32), (2, 17, 6, 24, 2, 40)], ids=str)
def test_equals_plain_pytorch(shape: Any, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    check(make(*shape, dtype=dtype, device=device), backend)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1, "initial": True},
        {"initial": True, "mask": True},
        {"taps": 2, "bias": False},
        {"gate": "after"},
        {"norm": False},
        {"norm": False, "gate": "none"},
        {"group_size": 16},
        {"dt_limit": (0.01, 0.1)},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], backend: str, device: torch.device) -> None:
    check(make(1, **options, device=device), backend)


@pytest.mark.parametrize("gate", ["before", "after"])
@pytest.mark.parametrize(
    "shape", [(2, 40, 4, 16, 2, 16), pytest.param((1, 300, 8, 64, 2, 128), marks=pytest.mark.gpu)], ids=str
)
def test_scan_output_beyond_float16(shape: Any, gate: str, backend: str, device: torch.device) -> None:
    """The norm takes what float16 could not hold."""
    _, _, heads, head_dim, groups, width = shape
    inner = heads * head_dim
    case = make(*shape, dtype=torch.float16, device=device, initial=True, gate=gate)
    case.options["initial_states"] *= 1e4
    case.weights["conv_weight"][inner + groups * width :] *= 4  # C
    case.weights["norm_weight"] = None
    bare = Case(case.projected, case.weights, case.head_dim, {**case.options, "gate": "none"})
    highest = torch.finfo(torch.float16).max
    # Random numbers differ by device: well beyond float16, and short of the 16 times that which is promised
    case.options["initial_states"] *= 6 * highest / bare.plain(torch.float64)[0].abs().amax()
    bare.options["initial_states"] = case.options["initial_states"]
    assert 4 * highest < bare.plain(torch.float64)[0].abs().amax() < 8 * highest
    case.weights["norm_weight"] = torch.linspace(0.5, 2, inner, device=device)
    oracle, final = case.plain(torch.float64)
    y, states = case.run(backend=backend)
    assert_golden(y, oracle.half(), oracle)
    assert_golden(states, case.plain(torch.float16)[1], final)


@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_small_scan_output_in_float16(size: float, backend: str, device: torch.device) -> None:
    """Room above costs no accuracy below, down to where the norm's eps takes over."""
    case = make(dtype=torch.float16, device=device, initial=True)
    case.weights["D"] *= size
    case.options["initial_states"] *= size
    case.weights["conv_weight"][64:96] *= size  # B
    case.weights["conv_bias"][64:96] *= size
    check(case, backend)


def test_final_conv(backend: str, device: torch.device) -> None:
    """The convolution's last inputs are written where they are asked for, and to nowhere else."""
    case = make(device=device)
    room = torch.full((3, 128, 6), torch.nan, device=device)
    case.run(final_conv=room[1:, :, 1:5], backend=backend)
    assert torch.equal(room[1:, :, 1:5], case.projected[:, -4:, 64:192].mT)
    assert room[0].isnan().all() and room[:, :, [0, 5]].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1000, 80, 64, 1, 128), (3, 257, 16, 32, 1, 128), (1, 5000, 8, 128, 8, 64)], ids=str
)
def test_sizes_of_models(shape: Any, dtype: torch.dtype) -> None:
    case = make(*shape, dtype=dtype, device="cuda", initial=True)
    check(case, "triton")
    expected = case.run()
    for _ in range(2):  # remembered kernels and descriptors, at other addresses
        case.projected = case.projected.clone()
        assert all(map(torch.equal, case.run(), expected))


def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = make(1, 20, device=device)
    w = case.weights
    tensors = (w["conv_weight"], w["conv_bias"], w["A_log"], w["D"], w["dt_bias"], w["norm_weight"])
    states = (None, None, torch.zeros(1, 128, 4, device=device), None)
    options = (2, 1e-6, 64, "before", "silu", 0.0, math.inf, True, "exact", torch.float32, backend)
    arguments = (case.projected, *tensors, *states, *options)
    torch.library.opcheck(torch.ops.fastmamba.mixer_prefill.default, arguments)


def test_gradients_come_from_the_torch_backend() -> None:
    case = make(1, 12, 2, 4, 1, 4)
    names = [name for name, value in case.weights.items() if isinstance(value, Tensor)]
    inputs = [case.projected, *(case.weights[name] for name in names)]
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def run(projected: Tensor, *weights: Tensor) -> Any:
        return mixer_prefill(projected, **{**case.weights, **dict(zip(names, weights, strict=True))})

    assert torch.autograd.gradcheck(run, inputs)
    with pytest.raises(RuntimeError, match="final_conv"):
        mixer_prefill(inputs[0], **case.weights | {"final_conv": torch.zeros(1, 16, 4)})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"projected": torch.zeros(2, 7)}, "projected must have shape"),
        ({"projected": torch.zeros(2, 7, 195)}, "no D and N fit"),
        ({"conv_weight": torch.zeros(127, 4)}, "no D and N fit"),
        ({"conv_bias": torch.zeros(127)}, "conv_bias must have shape"),
        ({"groups": 3}, "groups must divide the 4 heads, got 3"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"A_log": torch.zeros(4, device="meta")}, "A_log must be on cpu"),
        ({"gate": "never"}, "gate must be one of 'before', 'after', 'none', got 'never'"),
        ({"gate": "none"}, "got 'none'"),
        ({"group_size": 7}, "group_size must divide D = 64, got 7"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"activation": "relu"}, "activation must be"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit must be"),
        ({"mask": torch.zeros(2, 39)}, "mask must have shape"),
        ({"initial_conv": torch.zeros(2, 128, 4)}, "initial_conv must have shape"),
        ({"final_conv": torch.zeros(2, 127, 4)}, "final_conv must have shape"),
        ({"initial_states": torch.zeros(2, 4, 16, 8)}, "initial_states must have shape"),
        ({"precision": "fast"}, "precision must be one of"),
        ({"state_dtype": torch.float16}, "state_dtype must be"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, Any], named: str) -> None:
    case = make()
    with pytest.raises(ValueError, match=named):
        mixer_prefill(**{"projected": case.projected, **case.weights, "backend": "torch", **changes})
