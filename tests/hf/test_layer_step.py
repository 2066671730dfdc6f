"""One row, one token: a layer in three launches, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import fastmamba
from tests.hf.models import assert_golden, build, mixers, run, run_exact, tokens
from tests.hf.test_outputs import states

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ONE_GROUP = {"mamba2": {"n_groups": 1}, "granite": {"mamba_n_groups": 1, "num_local_experts": 0}}


@pytest.fixture(params=["block", "mixer"])
def scope(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the op."""
    from fastmamba import step

    calls: list[Any] = []
    own = step.layer_step

    def layer_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(step, "layer_step", layer_step)
    return calls


def decode(model: nn.Module, runs: Any = run) -> tuple[list[torch.Tensor], Any]:
    _, cache = runs(model, tokens(1, 9).to(DEVICE))
    found = []
    for seed in range(3):
        logits, cache = runs(model, tokens(1, 1, seed).to(DEVICE), cache)
        found.append(logits)
    return found, cache


@pytest.mark.parametrize("name", list(ONE_GROUP))
def test_decode(name: str, scope: str, taken: list[Any]) -> None:
    model = build(name, **ONE_GROUP[name]).to(DEVICE)
    fast = copy.deepcopy(model)
    fastmamba.patch(fast, backend="triton", scope=scope, cuda_graphs="off")
    exact, exact_cache = decode(model, run_exact)
    original, cache = decode(model)
    actual, fast_cache = decode(fast)
    assert len(taken) == 3 * len(mixers(fast))
    for tensors in zip(actual, original, exact, strict=True):
        assert_golden(*tensors, factor=4)  # as in test_triton
    for ours, theirs, true in zip(
        states(model, fast_cache), states(model, cache), states(model, exact_cache), strict=True
    ):
        for tensors in zip(ours, theirs, true, strict=True):
            assert_golden(*tensors, factor=4)
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)


def test_what_takes_the_ordinary_way(taken: list[Any]) -> None:
    """Hooks on projections, linears of another class, a batch, a plain PyTorch backend."""

    class Other(nn.Linear):
        pass

    def patched() -> nn.Module:
        model = build("mamba2", **ONE_GROUP["mamba2"]).to(DEVICE)
        fastmamba.patch(model, backend="triton", cuda_graphs="off")
        return model

    expected, _ = decode(patched())
    assert len(taken) == 9
    for change in ("hook", "class", "mixer hook", "backend"):
        taken.clear()
        model = patched()
        mixer = mixers(model)[0]
        seen: list[Any] = []
        if change == "hook":
            mixer.out_proj.register_forward_hook(lambda *args: seen.append(None))  # noqa: B023
        elif change == "class":
            mixer.in_proj.__class__ = Other
        elif change == "mixer hook":
            mixer.register_forward_hook(lambda *args: seen.append(None))  # noqa: B023
        else:
            fastmamba.patch(model, backend="torch", cuda_graphs="off")
        actual, _ = decode(model)
        # A hook on the mixer has the mixer called, which may still run in one piece.
        assert len(taken) == {"backend": 0, "mixer hook": 9}.get(change, 6)
        assert len(seen) == (4 if "hook" in change else 0)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    taken.clear()
    model = patched()
    _, cache = run(model, tokens(2, 9).to(DEVICE))
    run(model, tokens(2, 1).to(DEVICE), cache)
    assert taken == []
