"""The accuracy table: what counts as a match, and on which inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from evals import ssd_accuracy
from fastmamba.testing import ssd_case


def test_match_is_absolute_plus_relative():
    expected = torch.tensor([0.0, 1.0, 100.0, -100.0], dtype=torch.float16)
    actual = torch.tensor([0.0, 1.001953125, 100.0625, -101.0], dtype=torch.float16)
    assert ssd_accuracy.match(actual, expected, 0.0) == 0.25
    assert ssd_accuracy.match(actual, expected, 1e-3) == 0.75  # within 1e-3 + 1e-3 of 1, within 1e-3 + 0.1 of 100
    assert ssd_accuracy.match(actual, expected, 1e-2) == 1.0
    assert ssd_accuracy.match(torch.full_like(expected, torch.nan), expected, 1e-2) == 0.0


def test_the_article_s_inputs_have_its_distributions_and_our_strides():
    case = ssd_case(1, 2048, 4, 32, 1, 64, dtype=torch.float16)
    strides = case.x.stride(), case.dt.stride(), case.B.stride()
    article = ssd_accuracy.article_inputs(case, seed=0)
    assert (article.x.stride(), article.dt.stride(), article.B.stride()) == strides
    for tensor, mean, deviation in ((article.x, 5, 2), (article.B, 7, 3), (article.C, 20, 5), (article.dt, 0.5, 0.2)):
        assert tensor.float().mean().item() == pytest.approx(mean, rel=0.02)
        assert tensor.float().std().item() == pytest.approx(deviation, rel=0.05)
    assert article.A.shape == (4,) and (article.A < 0).all()


def test_the_states_of_the_original_take_the_dtype_asked_for():
    module = SimpleNamespace(_state_passing_fwd=lambda *arguments, out_dtype: out_dtype)
    before = module._state_passing_fwd
    with ssd_accuracy.states_in(module, torch.float32):
        assert module._state_passing_fwd(1, out_dtype=torch.float16) == torch.float32
    assert module._state_passing_fwd is before


def test_table():
    shares = {
        str(tolerance): share for tolerance, share in zip(ssd_accuracy.TOLERANCES, (0.5, 0.99819, 1.0), strict=True)
    }
    errors = {"y": 2e-3, "states": 1e-3}
    line = {"line": "hopper exact, fp32 states", "match": shares, "error": errors, "original_error": errors}
    console = Console(width=150, record=True)
    console.print(ssd_accuracy.table("a title", [line]))
    text = console.export_text()
    assert "99.819%" in text and "100.000%" in text and "2.00e-03" in text and "hopper exact, fp32 states" in text
