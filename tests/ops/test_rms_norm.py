"""RMSNorm alone and after the residual add, and the gate of the multilayer perceptron."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmamba.ops import add_rms_norm, rms_norm, silu_and_mul
from fastmamba.testing import assert_golden

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [96, 1536, 7]


def norm_by_definition(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As in transformers: the norm in float32 (float64 for the oracle), rounded before the weight."""
    u = x.to(dtype).to(torch.promote_types(dtype, torch.float32))
    return weight * (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(width: int, dtype: torch.dtype, x_dtype: torch.dtype, backend: str, device: torch.device) -> None:
    g = torch.Generator(device=device).manual_seed(width)
    x = torch.randn(2, 5, width + 8, device=device, generator=g).to(x_dtype)[..., 8:]
    weight = torch.rand(width, device=device, generator=g).to(dtype)
    y = rms_norm(x, weight, eps=1e-5, dtype=dtype, backend=backend)
    plain = norm_by_definition(x, weight, dtype)
    assert y.dtype == dtype and y.is_contiguous()
    assert_golden(y, plain, norm_by_definition(x.double(), weight.double(), torch.float64))
    # Rounded in the same places, the two differ by little: by what a sum in another order gives, and in Triton's
    # interpreter, which cuts off instead of rounding, by a unit each time.
    torch.testing.assert_close(y, plain, rtol=max(4 * torch.finfo(dtype).eps, 1e-6), atol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("factor", [1.0, 0.22])
@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "sum_dtype", "dtype"),
    [
        (torch.bfloat16, torch.float32, None, torch.bfloat16),  # Mamba2 with its residual in float32
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),  # its first block
        (torch.bfloat16, torch.bfloat16, None, None),  # Granite
        (torch.float16, torch.float16, None, None),
        (torch.float32, torch.float32, None, None),
    ],
)
def test_add_rms_norm(
    width: int,
    factor: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    sum_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
    backend: str,
    device: torch.device,
) -> None:
    g = torch.Generator(device=device).manual_seed(width)
    x = torch.randn(2, 5, width, device=device, generator=g).to(x_dtype)
    residual = torch.randn(2, 5, width, device=device, generator=g).to(residual_dtype)
    weight = torch.rand(width, device=device, generator=g).to(x_dtype)
    y, total = add_rms_norm(
        x, residual, weight, eps=1e-5, factor=factor, sum_dtype=sum_dtype, dtype=dtype, backend=backend
    )
    plain_total = residual.to(sum_dtype or residual_dtype) + x * factor
    plain = norm_by_definition(plain_total, weight, dtype or plain_total.dtype)
    assert total.dtype == plain_total.dtype and y.dtype == plain.dtype
    torch.testing.assert_close(
        total, plain_total, rtol=4 * torch.finfo(total.dtype).eps, atol=1e-2 if x_dtype == torch.bfloat16 else 1e-6
    )
    oracle = residual.double() + x.double() * factor
    assert_golden(total, plain_total, oracle)
    assert_golden(y, plain, norm_by_definition(oracle, weight.double(), torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [7, 96, 1024, 1100])
def test_silu_and_mul(dtype: torch.dtype, size: int, backend: str, device: torch.device) -> None:
    generator = torch.Generator(device=device).manual_seed(size)
    x = torch.randn(2, 20, 2 * size, device=device, generator=generator).to(dtype)
    y = silu_and_mul(x, backend=backend)
    gate, up = x.chunk(2, -1)
    exact_gate, exact_up = x.double().chunk(2, -1)
    plain = torch.nn.functional.silu(gate) * up
    assert y.dtype == dtype and y.is_contiguous()
    assert_golden(y, plain, torch.nn.functional.silu(exact_gate) * exact_up)


def test_the_registered_ops(backend: str, device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 24, device=device), torch.randn(24, device=device)
    torch.library.opcheck(torch.ops.fastmamba.rms_norm.default, (x, weight, 1e-6, torch.bfloat16, backend))
    arguments = (x, x + 1, weight, 1e-6, 0.5, torch.float32, torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.fastmamba.add_rms_norm.default, arguments)
    torch.library.opcheck(torch.ops.fastmamba.silu_and_mul.default, (x, backend))


def test_gradients_pass_through() -> None:
    x, residual, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5), (1, 2, 5), 5))
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, eps=1e-5, factor=0.5), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, eps=1e-5), (x, weight))
    assert torch.autograd.gradcheck(lambda a: silu_and_mul(a[..., :4]), (x,))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(9, 24)}, "x must have shape"),
        ({"x": torch.zeros(1, 0, 24)}, "x must not be empty"),
        ({"residual": torch.zeros(2, 9, 23)}, "residual must have shape"),
        ({"weight": torch.zeros(23)}, "weight must have shape"),
        ({"weight": torch.zeros(24, dtype=torch.int64)}, "weight must be float16"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"dtype": torch.int32}, "dtype must be a floating"),
        ({"sum_dtype": "float32"}, "sum_dtype must be a floating"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(changes: dict, named: str) -> None:
    good = dict(x=torch.zeros(2, 9, 24), residual=torch.zeros(2, 9, 24), weight=torch.zeros(24))
    for _ in range(2):  # a form that passed before excuses nothing
        add_rms_norm(**good)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match=named):
            add_rms_norm(**(good | changes))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="even last axis"):
        silu_and_mul(torch.zeros(1, 2, 3))
