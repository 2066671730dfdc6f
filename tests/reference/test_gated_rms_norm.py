"""The gated norm against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmamba.reference import gated_rms_norm
from fastmamba.testing import assert_golden, relative_error

ORACLE = 1e-12


def definition(x, weight, gate, eps, group_size, norm_before_gate, dtype):
    """Everything held in `dtype`."""
    y = x.to(dtype)
    gate = None if gate is None else F.silu(gate.to(dtype))
    if gate is not None and not norm_before_gate:
        y = y * gate
    grouped = y.unflatten(-1, (-1, group_size or x.shape[-1]))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    return y * gate if gate is not None and norm_before_gate else y


def inputs(shape, dtype, gated=True, seed=0):
    torch.manual_seed(seed)
    width = shape[-1]
    projection = torch.randn(*shape[:-1], width + 9).to(dtype)
    x = (torch.randn(shape) * torch.rand(shape[-1]).exp()).to(dtype)
    return x, torch.randn(width).to(dtype), projection[..., 3 : 3 + width] if gated else None


def check(arguments, *options):
    x = arguments[0]
    y = gated_rms_norm(*arguments, *options)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    double = tuple(None if t is None else t.double() for t in arguments)
    oracle = definition(*double, *options, torch.float64)
    assert relative_error(gated_rms_norm(*double, *options), oracle) <= ORACLE
    assert_golden(y, definition(*arguments, *options, x.dtype), oracle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 24, 80])
def test_options(dtype, gated, before, group_size):
    check(inputs((2, 7, 240), dtype, gated), 1e-5, group_size, before)


@pytest.mark.parametrize("shape", [(16,), (1, 8), (3, 24), (2, 3, 5, 32), (2, 150, 1536), (1, 4, 300_000)])
def test_shapes(shape):
    check(inputs(shape, torch.float32), 1e-6, None, False)


def test_strided_input():
    x, weight, gate = inputs((3, 50, 48), torch.float32)
    check((x.transpose(0, 1).contiguous().transpose(0, 1), weight, gate[:, :, :]), 1e-6, 16, False)
    check((x[:, ::2], weight, gate[:, ::2]), 1e-6, 16, True)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e15])
def test_extreme_rows(value):
    """Zero rows stay zero and nothing turns into NaN."""
    x = torch.full((2, 64), value)
    weight = torch.ones(64)
    y = gated_rms_norm(x, weight, None, 1e-6, None, False)
    oracle = definition(x.double(), weight.double(), None, 1e-6, None, False, torch.float64)
    assert_golden(y, definition(x, weight, None, 1e-6, None, False, torch.float32), oracle)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gradients(before, group_size):
    tensors = [t.detach().clone().requires_grad_() for t in inputs((2, 3, 8), torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: gated_rms_norm(*t, 1e-5, group_size, before), tensors, fast_mode=True)


def test_gradient_of_a_zero_row():
    x = torch.zeros(2, 8, requires_grad=True)
    gated_rms_norm(x, torch.ones(8), None, 1e-6, None, False).sum().backward()
    assert x.grad.isfinite().all()


def test_recording_gives_the_same_tensor():
    x, weight, gate = inputs((2, 150, 1536), torch.bfloat16)
    expected = gated_rms_norm(x, weight, gate, 1e-6, None, False)
    result = gated_rms_norm(x.clone().requires_grad_(), weight, gate, 1e-6, None, False)
    assert result.is_contiguous() and torch.equal(result.detach(), expected)
