"""Which variant of the SSD may serve a call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmamba.kernels import ssd as dispatch

pytest.importorskip("triton")


def regular(monkeypatch: pytest.MonkeyPatch, x: Tensor, B: Tensor, dt_min: float = 0.0) -> bool:
    """What the choice of a configuration is told of a call."""
    told: dict[str, Any] = {}

    class Chosen(Exception):
        pass

    def choose(*shape: Any, **keywords: Any) -> None:
        told.update(keywords)
        raise Chosen

    monkeypatch.setattr(dispatch, "ssd_config", choose)
    dt, A = torch.ones(x.shape[:3]), torch.ones(x.shape[2])
    with pytest.raises(Chosen):
        rest: Any = (None, None, None, None, True, dt_min, math.inf, False, None, torch.float32, False, False, 1.0)
        dispatch.ssd(x, dt, A, B, B, *rest)
    return told["regular"]


def test_views_of_a_projection_are_regular(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.zeros(2, 7, 3 * 64 + 2 * 128, dtype=torch.bfloat16)
    x, B = whole[..., : 3 * 64].view(2, 7, 3, 64), whole[..., 3 * 64 : 3 * 64 + 128].view(2, 7, 1, 128)
    assert regular(monkeypatch, x, B)


def test_rows_and_addresses_that_are_not_multiples_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    B = torch.zeros(1, 7, 1, 128, dtype=torch.bfloat16)
    odd = torch.zeros(1, 7, 3 * 64 + 1, dtype=torch.bfloat16)
    assert not regular(monkeypatch, odd[..., : 3 * 64].view(1, 7, 3, 64), B)
    shifted = torch.zeros(7 * 3 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 7, 3, 64)
    assert not regular(monkeypatch, shifted, B)
    assert not regular(monkeypatch, torch.zeros(1, 7, 6, 64, dtype=torch.bfloat16)[:, :, ::2], B)


def test_channel_major_activations_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    B = torch.zeros(1, 7, 1, 128, dtype=torch.bfloat16)
    channel_major = torch.zeros(1, 3 * 64, 7, dtype=torch.bfloat16).transpose(1, 2).unflatten(-1, (3, 64))
    assert regular(monkeypatch, channel_major, B)


def test_dt_below_zero_has_no_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    x, B = torch.zeros(1, 7, 3, 64, dtype=torch.bfloat16), torch.zeros(1, 7, 1, 128, dtype=torch.bfloat16)
    assert not regular(monkeypatch, x, B, dt_min=-1.0)
