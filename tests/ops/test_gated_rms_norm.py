"""The gated norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmamba.ops import gated_rms_norm
from fastmamba.testing import assert_golden


def by_definition(x: Tensor, weight: Tensor, gate: Tensor | None, group_size: int, before: bool) -> Tensor:
    """Every tensor in the dtype of x."""
    silu = 1 if gate is None else torch.nn.functional.silu(gate)
    u = x if before else x * silu
    grouped = u.unflatten(-1, (-1, group_size))
    y = (grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight.to(x.dtype)
    return y * silu if before else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("width", "group_size"), [(96, None), (96, 24), (1536, None), (7, 7)])
def test_against_the_definition(
    dtype: torch.dtype, before: bool, width: int, group_size: int | None, backend: str, device: torch.device
) -> None:
    g = torch.Generator(device=device).manual_seed(width)
    x = torch.randn(2, 5, width, device=device, generator=g).to(dtype)
    gate = torch.randn(2, 5, width + 8, device=device, generator=g).to(dtype)[..., :width]
    weight = torch.rand(width, device=device, generator=g).to(dtype)
    for used in (gate, None):
        y = gated_rms_norm(x, weight, used, eps=1e-5, group_size=group_size, norm_before_gate=before, backend=backend)
        d = [None if t is None else t.double() for t in (x, weight, used)]
        assert y.dtype == dtype and y.is_contiguous()
        plain = by_definition(x, weight, used, group_size or width, before)
        assert_golden(y, plain, by_definition(*d, group_size or width, before))


def test_the_registered_op(backend: str, device: torch.device) -> None:
    x, weight = torch.randn(2, 3, 24, device=device), torch.randn(24, device=device)
    torch.library.opcheck(torch.ops.fastmamba.gated_rms_norm.default, (x, weight, x, 1e-6, 12, False, backend))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(9, 24)}, "x must have shape"),
        ({"x": torch.zeros(0, 9, 24)}, "x must not be empty"),
        ({"weight": torch.zeros(23)}, "weight must have shape"),
        ({"gate": torch.zeros(2, 9, 23)}, "gate must have shape"),
        ({"gate": torch.zeros(2, 9, 24, dtype=torch.float16)}, "gate must have dtype torch.float32"),
        ({"group_size": 7}, "group_size must divide D = 24, got 7"),
        ({"eps": -1.0}, "eps must be 0 or more"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gated_rms_norm(**{"x": torch.zeros(2, 9, 24), "weight": torch.zeros(24), **changes})  # type: ignore[arg-type]
