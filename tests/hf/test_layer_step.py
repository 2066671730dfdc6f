"""One row, one token: a layer in three launches, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastmamba
from tests.hf.models import assert_golden, build, mixers, run, run_exact, tokens
from tests.hf.test_outputs import states
from tests.versions import SECOND

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.usefixtures("few_blocks"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of one group, so that the gated norm can be part of the step.
ONE_GROUP = {
    "mamba2": ("mamba2", {"n_groups": 1}),
    "dense": ("granite", {"mamba_n_groups": 1, "num_local_experts": 0, "residual_multiplier": 0.22}),
    "experts": ("granite", {"mamba_n_groups": 1, "residual_multiplier": 0.22}),
}


def one_group(name: str, **more: Any) -> nn.Module:
    family, changes = ONE_GROUP[name]
    return build(family, **changes, **more)


def small(name: str) -> nn.Module:
    """Two layers: the interpreter takes its time."""
    more = {} if name == "mamba2" else {"layer_types": ["mamba", "attention"]}
    return one_group(name, num_hidden_layers=2, **more).to(DEVICE)


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


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of `mlp_step`."""
    from fastmamba.hf import block_step

    calls: list[Any] = []
    own = block_step.mlp_step

    def mlp_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(block_step, "mlp_step", mlp_step)
    return calls


def decode(model: nn.Module, runs: Any = run, steps: int = 3) -> tuple[list[torch.Tensor], Any]:
    device = next(model.parameters()).device
    _, cache = runs(model, tokens(1, 2 * steps).to(device))
    found = []
    for seed in range(steps):
        logits, cache = runs(model, tokens(1, 1, seed).to(device), cache)
        found.append(logits.cpu())
    return found, cache


def begun(name: str) -> Any:
    """A cache after a few tokens, by the original: the interpreter takes seconds for them."""
    return run(small(name), tokens(1, 2).to(DEVICE))[1]


def one_step(model: nn.Module, cache: Any) -> torch.Tensor:
    return run(model, tokens(1, 1).to(DEVICE), copy.deepcopy(cache))[0]


@pytest.mark.parametrize(
    ("name", "scope"), [("mamba2", "block"), ("dense", "block"), ("experts", "block"), ("mamba2", "mixer")]
)
def test_decode(name: str, scope: str, taken: list[Any], fed: list[Any]) -> None:
    if SECOND and (name == "dense" or scope == "mixer"):
        pytest.skip("in Triton's interpreter on the newest transformers alone: less of what the others have")
    model = one_group(name)  # the original on the CPU: kernels that it finds on a GPU know no float64
    fast = copy.deepcopy(model).to(DEVICE)
    fastmamba.patch(fast, backend="triton", scope=scope, cuda_graphs="off")
    exact, exact_cache = decode(model, run_exact)
    original, cache = decode(model)
    actual, fast_cache = decode(fast)
    assert len(taken) == 3 * len(mixers(fast))
    # In a block the norm before the mixer and the residual add are part of the step.
    assert all((call["norm_weight"] is not None) == (scope == "block") for call in taken)
    assert all((call["residual_scale"] is not None) == (scope == "block") for call in taken)
    assert len(fed) == (0 if name == "mamba2" or scope == "mixer" else 3 * len(fast.model.layers))
    for tensors in zip(actual, original, exact, strict=True):
        assert_golden(*tensors, factor=4)  # as in test_triton
    for ours, theirs, true in zip(
        states(model, fast_cache), states(model, cache), states(model, exact_cache), strict=True
    ):
        for tensors in zip(ours, theirs, true, strict=True):
            assert_golden(*(tensor.cpu() for tensor in tensors), factor=4)
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)


def test_what_takes_the_ordinary_way(taken: list[Any]) -> None:
    """Hooks on projections, linears of another class, a batch, a plain PyTorch backend."""

    class Other(nn.Linear):
        pass

    def patched() -> nn.Module:
        model = small("mamba2")
        fastmamba.patch(model, backend="triton", cuda_graphs="off")
        return model

    cache = begun("mamba2")
    expected = one_step(patched(), cache)
    assert len(taken) == 2
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
        actual = one_step(model, cache)
        # A hook on the mixer has the mixer called, which may still run in one piece.
        assert len(taken) == {"backend": 0, "mixer hook": 2}.get(change, 1)
        assert len(seen) == (1 if "hook" in change else 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    taken.clear()
    _, two_rows = run(small("mamba2"), tokens(2, 2).to(DEVICE))
    run(patched(), tokens(2, 1).to(DEVICE), two_rows)
    assert taken == []


def test_when_the_perceptron_takes_the_ordinary_way(fed: list[Any]) -> None:
    """Hooks, an adapter's linear, an activation of another kind, experts computed by the user, a batch."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    class Other(nn.Linear):
        pass

    def patched() -> nn.Module:
        model = small("experts")
        fastmamba.patch(model, backend="triton", cuda_graphs="off")
        return model

    cache = begun("experts")
    expected = one_step(patched(), cache)
    assert len(fed) == 2
    changes = {
        "hook": lambda layer: layer.block_sparse_moe.router.register_forward_hook(lambda *args: seen.append(None)),
        "norm's hook": lambda layer: layer.post_attention_layernorm.register_forward_hook(
            lambda *args: seen.append(None)
        ),
        "class": lambda layer: setattr(layer.shared_mlp.output_linear, "__class__", Other),
        "strides": lambda layer: setattr(
            layer.block_sparse_moe.experts.down_proj,
            "data",
            layer.block_sparse_moe.experts.down_proj.data.mT.contiguous().mT,
        ),
        "activation": lambda layer: setattr(layer.shared_mlp, "activation", nn.Sequential(nn.SiLU())),
        "forward": lambda layer: setattr(
            layer.block_sparse_moe, "forward", lambda x: type(layer.block_sparse_moe).forward(layer.block_sparse_moe, x)
        ),
    }
    for name, change in changes.items():
        fed.clear()
        seen: list[Any] = []
        model = patched()
        layer = model.model.layers[0]
        change(layer)
        actual = one_step(model, cache)
        assert len(fed) == 1, name
        assert len(seen) == (1 if "hook" in name else 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    fed.clear()
    model = patched()
    ALL_EXPERTS_FUNCTIONS["mine"] = batched_mm_experts_forward
    try:
        model.config._experts_implementation = "mine"
        one_step(model, cache)
    finally:
        del ALL_EXPERTS_FUNCTIONS["mine"]
    _, two_rows = run(small("experts"), tokens(2, 2).to(DEVICE))
    run(patched(), tokens(2, 1).to(DEVICE), two_rows)
    assert fed == []


def test_router_logits_are_collected(fed: list[Any]) -> None:
    """A call that asks for them gets those of every layer, and the one after it takes the short way."""
    model = small("experts")
    fastmamba.patch(model, backend="triton", cuda_graphs="off")
    cache = begun("experts")
    ids = tokens(1, 1).to(DEVICE)
    with torch.no_grad():
        output = model(ids, past_key_values=cache, use_cache=True, output_router_logits=True)
    if getattr(output, "router_logits", None) is None:
        pytest.skip(f"transformers {transformers.__version__} collects no router logits of this model")
    assert len(output.router_logits) == 2
    assert fed == []
    one_step(model, cache)
    assert len(fed) == 2
