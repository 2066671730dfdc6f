"""Patched models on a GPU, on the Triton kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmamba
from tests.hf.models import MAIN, build, padding, run, tokens
from tests.hf.test_outputs import greedy

pytestmark = pytest.mark.gpu

REAL_HEADS = {
    "mamba2": {"hidden_size": 256, "num_heads": 8, "head_dim": 64, "state_size": 128, "n_groups": 1},
    "granite": {
        "hidden_size": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
    },
}


@pytest.fixture(params=[(name, real) for name in MAIN for real in (False, True)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """An original model in float32 on the GPU and its patched copy."""
    name, real = request.param
    model = build(name, **(REAL_HEADS[name] if real else {})).cuda()
    fast = copy.deepcopy(model)
    report = fastmamba.patch(fast)
    assert report.patched == 2 + (name == "mamba2")
    assert {name for layer in report.layers for name in layer.backends.values()} == {"triton"}
    return model, fast


def test_greedy_tokens_are_identical(pair: tuple[nn.Module, nn.Module]) -> None:
    """1,000 tokens in a padded batch of 3, a 17-token chunk that continues the cache, then 32 tokens."""
    ids, mask = tokens(3, 1000).cuda(), padding([1000, 640, 77], 1000, "left").cuda()
    chunk = tokens(3, 17, seed=2).cuda()
    model, fast = pair
    assert torch.equal(greedy(fast, ids, mask, chunk, 32), greedy(model, ids, mask, chunk, 32))
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_like_the_original(pair: tuple[nn.Module, nn.Module], dtype: torch.dtype) -> None:
    model, fast = pair
    ids = tokens(2, 777).cuda()
    exact, _ = run(model, ids)
    original, _ = run(model.to(dtype), ids)
    ours, _ = run(fast.to(dtype), ids)

    def error(logits: torch.Tensor) -> float:
        return (logits.float() - exact).square().mean().sqrt().item()

    # Twice, as everywhere: the original's scan in plain PyTorch is float32 up to the norm, ours rounds y before it, and
    # the granite model's router turns small differences into other experts.
    assert error(ours) <= 2 * error(original)


def test_generate_in_half_precision(pair: tuple[nn.Module, nn.Module]) -> None:
    _, fast = pair
    fast.to(torch.bfloat16)
    ids, mask = tokens(3, 50).cuda(), padding([50, 20, 5], 50, "left").cuda()
    out = fast.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, use_cache=True)
    assert out.shape == (3, 70)
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)
