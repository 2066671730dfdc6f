"""scope="block": the layers around the mixers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmamba
from fastmamba.hf import block_forward, handoff
from tests.hf.models import assert_golden as assert_golden_logits
from tests.hf.models import build, run, run_exact, tokens


@pytest.fixture(params=["mamba2", "granite", "granite_dense", "mamba2_bf16_residual"])
def variant(request: pytest.FixtureRequest) -> nn.Module:
    """Models whose layers differ."""
    if request.param == "granite_dense":
        return build("granite", num_local_experts=0, residual_multiplier=0.22)
    if request.param == "mamba2_bf16_residual":
        return build("mamba2", residual_in_fp32=False)
    return build(request.param)


def patched_copy(model: nn.Module, scope: str = "block") -> nn.Module:
    model = copy.deepcopy(model)
    report = fastmamba.patch(model, scope=scope, backend="torch")
    if scope == "block":
        assert report.blocks is not None and report.blocks.fast == report.blocks.layers == len(layers(model))
        assert {layer.scope for layer in report.layers} == {"block"}
    return model


def layers(model: nn.Module) -> nn.ModuleList:
    return model.base_model.layers


def logits(model: nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    return run(model, ids, **kwargs)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_compute_what_they_did(variant: nn.Module, dtype: torch.dtype) -> None:
    """In plain PyTorch, to the bit: the same operations in the same order, with the same roundings."""
    model, ids = variant.to(dtype), tokens(2, 20)
    expected = run(patched_copy(model, "mixer"), ids, output_hidden_states=True)
    for kwargs in ({"output_hidden_states": True}, {}):
        fast = patched_copy(model)
        assert torch.equal(logits(fast, ids, **kwargs), expected[0])
        assert fastmamba.report(fast).blocks.original_calls == {}
    names = {"output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        ours, theirs = fast(ids, **names), patched_copy(model, "mixer")(ids, **names)
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    for hidden, true in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert hidden.dtype == true.dtype and torch.equal(hidden, true)
    assert not handoff._left


def test_norms_join_the_add_before_them(variant: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("rms_norm", "add_rms_norm"):
        own = getattr(block_forward, name)
        monkeypatch.setattr(block_forward, name, lambda *a, own=own, name=name, **k: calls.append(name) or own(*a, **k))
    fast = patched_copy(variant)
    logits(fast, tokens(1, 9))
    per_layer = 2 if hasattr(layers(fast)[0], "post_attention_layernorm") else 1
    assert calls == ["rms_norm"] + ["add_rms_norm"] * (per_layer * len(layers(fast)))


@pytest.mark.parametrize("way", ["new", "in place", "pre"])
def test_hooks_on_layers_may_change_hidden_states(variant: nn.Module, way: str) -> None:
    def change(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * 1.5 if way == "new" else output.mul_(1.5)

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] + 1.0, *args[1:])

    ids, fast = tokens(2, 9), patched_copy(variant)
    original = copy.deepcopy(variant)
    for model in (fast, original):
        if way == "pre":
            layers(model)[1].register_forward_pre_hook(before)
        else:
            layers(model)[0].register_forward_hook(change)
    exact = run_exact(original, ids)[0]
    assert_golden_logits(logits(fast, ids), logits(original, ids), exact)
    assert not torch.allclose(logits(fast, ids), logits(variant, ids), atol=1e-2)


def test_hooks_on_norms_are_called(variant: nn.Module) -> None:
    fast, seen = patched_copy(variant), []
    expected = logits(fast, tokens(1, 9))
    norms = [m for m in fast.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: seen.append(module))
    torch.testing.assert_close(logits(fast, tokens(1, 9)), expected)
    assert set(seen) == set(norms)


def test_global_hooks_see_norms(variant: nn.Module) -> None:
    fast, seen = patched_copy(variant), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        logits(fast, tokens(1, 9))
    finally:
        handle.remove()
    assert {m for m in fast.modules() if type(m).__name__.endswith("RMSNorm")} <= set(seen)


@pytest.mark.filterwarnings("ignore::fastmamba.FastMambaWarning")
def test_gradients_run_the_original_and_are_counted(variant: nn.Module) -> None:
    fast, ids = patched_copy(variant), tokens(1, 9)
    fast(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in fast.parameters())
    count = len(layers(fast))
    assert fastmamba.report(fast).blocks.original_calls == {"gradients are needed": count}
    assert f"{count}x original: gradients" in str(fastmamba.report(fast))
    fast.train()
    torch.testing.assert_close(fast(ids).logits, copy.deepcopy(variant).train()(ids).logits)


def test_inference_mode(variant: nn.Module) -> None:
    fast, ids = patched_copy(variant), tokens(1, 9)
    expected = logits(fast, ids)
    with torch.inference_mode():
        assert torch.equal(fast(ids).logits, expected)
    assert not handoff._left


def test_a_deepcopy_uses_its_own_norms(variant: nn.Module) -> None:
    fast, ids = patched_copy(variant), tokens(1, 9)
    copied, changed = copy.deepcopy(fast), copy.deepcopy(variant)
    for model in (copied, changed):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.mul_(2.0)
    assert torch.equal(logits(copied, ids), logits(patched_copy(changed), ids))
    assert not torch.equal(logits(copied, ids), logits(fast, ids))


def test_norms_and_layers_may_be_exchanged(variant: nn.Module) -> None:
    fast, ids = patched_copy(variant), tokens(1, 9)
    name = "norm" if hasattr(layers(fast)[1], "norm") else "input_layernorm"
    for model in (fast, variant):
        setattr(layers(model)[1], name, copy.deepcopy(getattr(layers(model)[2], name)))
        layers(model)[0], layers(model)[2] = layers(model)[2], layers(model)[0]
    exact = run_exact(variant, ids, use_cache=False)[0]
    assert_golden_logits(logits(fast, ids, use_cache=False), logits(variant, ids, use_cache=False), exact)


def test_what_was_left_goes_with_its_tensor() -> None:
    hidden, norm = torch.ones(1, 2, 3), nn.LayerNorm(3)
    handoff.leave(hidden, norm, hidden * 2)
    assert handoff.take(hidden.clone(), norm) is None
    assert torch.equal(handoff.take(hidden, norm), hidden * 2)
    assert handoff.take(hidden, norm) is None  # given out once
    handoff.leave(hidden, norm, hidden * 2)
    hidden.add_(1)
    assert handoff.take(hidden, norm) is None
    handoff.leave(hidden, norm, hidden * 2)
    del hidden
    assert not handoff._left


def test_other_scopes_leave_layers_alone(variant: nn.Module) -> None:
    for scope in ("mixer", "ssd"):
        fastmamba.patch(variant)
        report = fastmamba.patch(variant, scope=scope)
        assert report.blocks is None and {layer.scope for layer in report.layers} == {scope}
        assert "forward" not in layers(variant)[0].__dict__
    with fastmamba.patched(variant):
        assert "forward" in layers(variant)[0].__dict__
    assert "forward" not in layers(variant)[0].__dict__


def test_the_gate_of_the_perceptron_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def silu_and_mul(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        return own(*args, **kwargs)

    own = block_forward.silu_and_mul
    monkeypatch.setattr(block_forward, "silu_and_mul", silu_and_mul)
    model = patched_copy(build("granite"))
    logits(model, tokens(2, 20))
    assert len(calls) == len(layers(model))
    calls.clear()
    other = build("granite")
    for layer in layers(other):
        layer.shared_mlp.activation = nn.GELU()
    logits(patched_copy(other), tokens(2, 20))
    assert calls == []
