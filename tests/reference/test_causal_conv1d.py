"""The convolution against its definition, one shifted product after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmamba.reference import causal_conv1d, causal_conv1d_update
from fastmamba.testing import assert_golden, relative_error

ORACLE = 1e-12


def definition(x, weight, bias, initial_states, mask, activation, dtype):
    """Everything held in `dtype`."""
    x_, weight_ = x.to(dtype), weight.to(dtype)
    past = weight.shape[1] - 1
    if initial_states is None:
        before = torch.zeros(x.shape[0], past, x.shape[2], dtype=dtype)
    else:
        before = initial_states.transpose(1, 2).to(dtype)
    padded = torch.cat([before, x_], dim=1)
    y = sum(padded[:, k : k + x.shape[1]] * weight_[:, k] for k in range(past + 1))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation is not None:
        y = F.silu(y)
    return y if mask is None else y * mask.to(dtype)[..., None]


def inputs(batch, tokens, channels, width, dtype, *, bias=True, initial=False, mask=False, seed=0):
    torch.manual_seed(seed)
    projection = torch.randn(batch, tokens, channels + 13).to(dtype)
    return (
        projection[..., 5 : 5 + channels],  # a view of something wider, as the mixer gives it
        (torch.randn(channels, width) / width).to(dtype),
        torch.randn(channels).to(dtype) if bias else None,
        torch.randn(batch, channels, width - 1).to(dtype) if initial else None,
        (torch.rand(batch, tokens) > 0.3).to(dtype) if mask else None,
    )


def check(arguments, activation):
    y = causal_conv1d(*arguments, activation)
    dtype = arguments[0].dtype
    double = tuple(None if t is None else t.double() for t in arguments)
    oracle = definition(*double, activation, torch.float64)
    assert y.shape == arguments[0].shape and y.dtype == dtype and y.is_contiguous()
    assert relative_error(causal_conv1d(*double, activation), oracle) <= ORACLE
    assert_golden(y, definition(*arguments, activation, dtype), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 8, 4), (2, 2, 24, 4), (2, 3, 17, 4), (1, 515, 40, 4), (3, 1030, 7, 3), (2, 9, 16, 2)]
)
@pytest.mark.parametrize("initial", [False, True])
def test_shapes(shape, dtype, initial):
    check(inputs(*shape, dtype, initial=initial), "silu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_options(bias, mask, activation):
    check(inputs(2, 70, 24, 4, torch.float32, bias=bias, mask=mask, initial=mask), activation)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_widths(width):
    check(inputs(2, 30, 16, width, torch.float32, initial=True), "silu")


def test_channel_major_input():
    x, *rest = inputs(2, 40, 24, 4, torch.float32)
    check((x.transpose(1, 2).contiguous().transpose(1, 2), *rest), "silu")


@pytest.mark.parametrize("first", [1, 2, 40])
def test_continuing(first):
    x, weight, bias, *_ = inputs(2, 64, 24, 4, torch.float64)
    whole = causal_conv1d(x, weight, bias, None, None, "silu")
    states = F.pad(x[:, :first].transpose(1, 2), (3, 0))[..., -3:]
    parts = [
        causal_conv1d(x[:, :first], weight, bias, None, None, "silu"),
        causal_conv1d(x[:, first:], weight, bias, states, None, "silu"),
    ]
    assert relative_error(torch.cat(parts, dim=1), whole) <= ORACLE


@pytest.mark.parametrize("initial", [False, True])
def test_gradients(initial):
    arguments = inputs(2, 6, 3, 4, torch.float64, initial=initial, mask=True)
    tensors = [t.detach().clone().requires_grad_() if t is not None else None for t in arguments]
    given = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(lambda *_: causal_conv1d(*tensors, "silu"), given, fast_mode=True)


def test_recording_gives_the_same_tensor():
    x, *rest = inputs(2, 600, 24, 4, torch.float16)
    expected = causal_conv1d(x, *rest, "silu")
    result = causal_conv1d(x.detach().clone().requires_grad_(), *rest, "silu")
    assert result.is_contiguous() and result.dtype == torch.float16
    assert torch.equal(result.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("activation", ["silu", None])
def test_updates_continue_the_convolution(dtype, extra, activation):
    x, weight, bias, *_ = inputs(2, 12, 24, 4, dtype)
    state = torch.zeros(2, 24, 3 + extra, dtype=dtype)
    memory = state.data_ptr()
    y = torch.stack([causal_conv1d_update(x[:, t], state, weight, bias, activation) for t in range(12)], dim=1)
    oracle = definition(x.double(), weight.double(), bias.double(), None, None, activation, torch.float64)
    assert y.dtype == dtype and state.data_ptr() == memory
    assert torch.equal(state, x[:, -state.shape[2] :].transpose(1, 2))
    if dtype == torch.float64:
        assert relative_error(y, oracle) <= ORACLE
    else:
        assert_golden(y, definition(x, weight, bias, None, None, activation, dtype), oracle)
