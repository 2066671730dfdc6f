"""The convolution over a sequence and its one-token step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmamba.ops import causal_conv1d, causal_conv1d_update
from fastmamba.testing import assert_golden

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_definition(x: Tensor, weight: Tensor, bias: Tensor | None, init: Tensor | None, mask: Tensor | None) -> Tensor:
    """Every tensor in the dtype of x."""
    dtype, width = x.dtype, weight.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if init is None else init.to(dtype).transpose(1, 2)
    padded = torch.cat([before, x], 1)
    y = sum(padded[:, k : k + x.shape[1]] * weight[:, k].to(dtype) for k in range(width))
    y = torch.nn.functional.silu(y if bias is None else y + bias.to(dtype))
    return y if mask is None else y * mask[..., None].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_against_the_definition(
    dtype: torch.dtype, width: int, tokens: int, backend: str, device: torch.device
) -> None:
    channels = 40
    g = torch.Generator(device=device).manual_seed(tokens)
    projected = torch.randn(2, tokens, channels + 24, device=device, generator=g).to(dtype)
    x = projected[..., 8 : 8 + channels]
    weight = torch.randn(channels, width, device=device, generator=g).to(dtype)
    bias = torch.randn(channels, device=device, generator=g).to(dtype)
    state = torch.randn(2, channels, width, device=device, generator=g).to(dtype)
    mask = torch.rand(2, tokens, device=device, generator=g) > 0.3
    for use_bias, init, use_mask in ((bias, state[..., 1:], mask), (None, None, None), (bias, None, mask.long())):
        y = causal_conv1d(x, weight, use_bias, initial_states=init, mask=use_mask, backend=backend)
        d = [None if t is None else t.double() for t in (x, weight, use_bias, init, use_mask)]
        assert y.dtype == dtype and y.is_contiguous()
        assert_golden(y, by_definition(x, weight, use_bias, init, use_mask), by_definition(*d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "slots"), [(1, 4), (3, 4), (17, 4), (17, 3), (2, 7)])
@pytest.mark.parametrize("continuing", [False, True])
def test_final_states(
    dtype: torch.dtype, tokens: int, slots: int, continuing: bool, backend: str, device: torch.device
) -> None:
    x = torch.randn(2, tokens, 40, device=device).to(dtype)
    weight = torch.randn(40, 4, device=device).to(dtype)
    init = torch.randn(2, 40, 3, device=device).to(dtype) if continuing else None
    final = torch.full((2, slots, 40), torch.nan, device=device, dtype=dtype).transpose(1, 2)
    y = causal_conv1d(x, weight, initial_states=init, final_states=final, backend=backend)
    assert torch.equal(y, causal_conv1d(x, weight, initial_states=init, backend=backend))
    before = x.new_zeros(2, slots, 40) if init is None else torch.cat([x.new_zeros(2, slots, 40), init.mT], 1)
    assert torch.equal(final, torch.cat([before, x], 1)[:, -slots:].mT)


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("channels", [256, 300])
def test_tiles(width: int, channels: int, backend: str, device: torch.device) -> None:
    """More tokens and channels than a program takes, rows that start at odd places, another layout of the weights."""
    projected = torch.randn(2, 19, channels + 3, device=device)
    x = projected[..., 3:]
    weight = torch.randn(width, channels, device=device).mT
    for given in (weight, weight.contiguous(), weight.bfloat16().contiguous(), weight.bfloat16()):
        y = causal_conv1d(x, given, backend=backend)
        plain, oracle = (by_definition(x.to(d), given.to(d), None, None, None) for d in (torch.float32, torch.float64))
        assert_golden(y, plain, oracle)


def test_without_activation(backend: str, device: torch.device) -> None:
    x = torch.randn(1, 9, 20, device=device)
    weight = torch.zeros(20, 4, device=device)
    weight[:, -1] = 1
    assert torch.equal(causal_conv1d(x, weight, activation=None, backend=backend), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "slots"), [(4, 4), (4, 3), (4, 7), (2, 2), (1, 1)])
def test_steps_equal_the_sequence(
    dtype: torch.dtype, width: int, slots: int, backend: str, device: torch.device
) -> None:
    g = torch.Generator(device=device).manual_seed(slots)
    projected = torch.randn(3, 10, 50, device=device, generator=g).to(dtype)
    x = projected[..., 6:46]
    weight = torch.randn(40, width, device=device, generator=g).to(dtype)
    bias = torch.randn(40, device=device, generator=g).to(dtype)
    state = torch.zeros(3, 40, slots, device=device, dtype=dtype)
    address = state.data_ptr()
    steps = [causal_conv1d_update(x[:, t], state, weight, bias, backend=backend) for t in range(10)]
    oracle = by_definition(x.double(), weight.double(), bias.double(), None, None)
    assert_golden(torch.stack(steps, 1), by_definition(x, weight, bias, None, None), oracle)
    assert state.data_ptr() == address
    assert torch.equal(state, x[:, -slots:].transpose(1, 2))


def test_the_registered_ops(backend: str, device: torch.device) -> None:
    x, weight = torch.randn(2, 9, 20, device=device), torch.randn(20, 4, device=device)
    for final in (None, torch.empty(2, 20, 4, device=device)):
        arguments = (x, weight, None, None, None, final, "silu", backend)
        torch.library.opcheck(torch.ops.fastmamba.causal_conv1d.default, arguments)
    state = torch.randn(2, 20, 4, device=device)
    arguments = (x[:, 0], state, weight, None, "silu", backend)
    torch.library.opcheck(torch.ops.fastmamba.causal_conv1d_update.default, arguments)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(2, 20)}, "x must have shape"),
        ({"x": torch.zeros(2, 0, 20)}, "x must not be empty"),
        ({"weight": torch.zeros(21, 4)}, "weight must have shape"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
        ({"initial_states": torch.zeros(2, 20, 4)}, "initial_states must have shape"),
        ({"mask": torch.zeros(2, 8)}, "mask must have shape"),
        ({"activation": "gelu"}, "activation must be 'silu', 'swish' or None, got 'gelu'"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, object], named: str) -> None:
    arguments = {"x": torch.zeros(2, 9, 20), "weight": torch.zeros(20, 4), **changes}
    with pytest.raises(ValueError, match=named):
        causal_conv1d(**arguments)  # type: ignore[arg-type]


def test_bad_input_of_the_step_is_named() -> None:
    x, weight = torch.zeros(2, 20), torch.zeros(20, 4)
    with pytest.raises(ValueError, match="conv_state must hold at least W - 1 = 3 inputs, got 2"):
        causal_conv1d_update(x, torch.zeros(2, 20, 2), weight)
    with pytest.raises(ValueError, match="conv_state must have shape"):
        causal_conv1d_update(x, torch.zeros(3, 20, 4), weight)
    with pytest.raises(RuntimeError, match="must not require gradients"):
        causal_conv1d_update(x, torch.zeros(2, 20, 4, requires_grad=True), weight)
