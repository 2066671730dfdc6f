"""With accelerate and PEFT, which put their own things on the modules that are patched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmamba
from tests.hf.models import assert_golden, mixers, run, run_exact, tokens
from tests.hf.test_patch import is_unchanged, snapshot

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
hooks = pytest.importorskip("accelerate.hooks")
peft = pytest.importorskip("peft", reason="peft is not installed")

# PEFT asks transformers by the old name whether gradients are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def offload(model: nn.Module, way: str, folder: str) -> nn.Module:
    if way == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if way == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    blocks = {name: "cpu" for name, module in model.named_modules() if name.count(".") == 2 and "layers" in name}
    names = [name.rsplit(".", 1)[0] for name, _ in model.named_parameters(remove_duplicate=False)]
    device_map = {name: "cpu" for name in names if not name.startswith(tuple(f"{block}." for block in blocks))} | blocks
    device_map[list(blocks)[-1]] = "disk"
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("scope", ["block", "ssd"])
@pytest.mark.parametrize("first", ["hooks", "patch"])
@pytest.mark.parametrize("way", ["cpu", "disk", "dispatch"])
def test_accelerate(main_model, way, first, scope, tmp_path):
    ids = tokens(2, 20)
    exact, _ = run_exact(main_model, ids)
    original, _ = run(main_model, ids)
    generated = main_model.generate(ids, max_new_tokens=4, do_sample=False)
    count = len(mixers(main_model))
    if first == "hooks":
        fast = offload(main_model, way, str(tmp_path))
        before = snapshot(fast)
        assert fastmamba.patch(fast, scope=scope).patched == count
    else:
        fastmamba.patch(main_model, scope=scope)
        fast = offload(main_model, way, str(tmp_path))
    report = fastmamba.report(fast)
    assert (report.patched, {layer.device for layer in report.layers}) == (count, {"cpu"})
    last = mixers(fast)[-1]
    offloaded = [parameter.is_meta for parameter in last.parameters()]
    assert all(offloaded)
    assert_golden(run(fast, ids)[0], original, exact)
    assert torch.equal(fast.generate(ids, max_new_tokens=4, do_sample=False), generated)
    assert [parameter.is_meta for parameter in last.parameters()] == offloaded
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)
    assert fastmamba.unpatch(fast) == count
    if first == "hooks":
        assert is_unchanged(before)
    assert torch.equal(run(fast, ids)[0], original)


def test_hooks_leave_no_trace_of_a_patch(mamba2):
    """Hooks over a patch, unpatched, are the hooks that an unpatched model gets; so too once they are removed."""
    twin = copy.deepcopy(mamba2)
    fastmamba.patch(mamba2)
    for model in (mamba2, twin):
        for mixer in mixers(model):
            hooks.add_hook_to_module(mixer, hooks.ModelHook())
    fastmamba.unpatch(mamba2)
    for ours, theirs in zip(mixers(mamba2), mixers(twin), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours._old_forward.__func__ is theirs._old_forward.__func__
        assert vars(ours.forward).keys() == vars(theirs.forward).keys()
        assert ours.forward.__wrapped__ == ours._old_forward
        hooks.remove_hook_from_module(ours)
        hooks.remove_hook_from_module(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        assert ours.forward.__func__ is theirs.forward.__func__


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_hooks_removed_after_patch(mamba2, first):
    ids, before = tokens(2, 9), snapshot(mamba2)
    expected, _ = run(mamba2, ids)

    def add() -> None:
        for mixer in mixers(mamba2):
            hooks.add_hook_to_module(mixer, hooks.ModelHook())
            hooks.add_hook_to_module(mixer, hooks.ModelHook(), append=True)

    if first == "hooks":
        add()
    fastmamba.patch(mamba2)
    if first == "patch":
        add()
    fast, _ = run(mamba2, ids)
    assert not torch.equal(fast, expected)
    hooks.remove_hook_from_module(mamba2, recurse=True)
    assert fastmamba.report(mamba2).patched == 3
    assert torch.equal(run(mamba2, ids)[0], fast)
    assert fastmamba.unpatch(mamba2) == 3
    assert torch.equal(run(mamba2, ids)[0], expected)
    if first == "patch":
        # accelerate itself leaves forwards behind, on every module it took hooks from
        assert is_unchanged([pair for pair in before if pair[0] in mixers(mamba2)])


def test_deepcopy_of_a_hooked_model(mamba2):
    ids = tokens(2, 9)
    for mixer in mixers(mamba2):
        hooks.add_hook_to_module(mixer, hooks.ModelHook())
    fastmamba.patch(mamba2)
    expected, _ = run(mamba2, ids)
    twin = copy.deepcopy(mamba2)
    assert fastmamba.report(twin).patched == 3
    assert [mixer._old_forward.__self__ for mixer in mixers(twin)] == mixers(twin)
    assert torch.equal(run(twin, ids)[0], expected)


def add_lora(model: nn.Module) -> nn.Module:
    # PEFT refuses out_proj of Mamba2 models, whose own fast path would read past the adapter.
    targets = ["in_proj"] if hasattr(model, "backbone") else ["in_proj", "out_proj", "q_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped


@pytest.mark.parametrize("first", ["lora", "patch"])
def test_lora(main_model, first):
    ids = tokens(2, 20)
    plain, _ = run(main_model, ids)
    reference = add_lora(copy.deepcopy(main_model))
    with torch.no_grad():
        original = reference(input_ids=ids).logits
    exact, _ = run_exact(reference, ids)
    assert (original - plain).abs().max() > 0.01
    if first == "lora":
        model = add_lora(main_model)
        fastmamba.patch(model)
    else:
        fastmamba.patch(main_model)
        model = add_lora(main_model)
    assert fastmamba.report(model).patched == len(mixers(model))
    with torch.no_grad():
        assert_golden(model(input_ids=ids).logits, original, exact)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert all(layer.original_calls == {} for layer in fastmamba.report(model).layers)

    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    reference.train()
    torch.testing.assert_close(loss, reference(input_ids=ids, labels=ids).loss, rtol=0, atol=0)
    loss.backward()
    adapted = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapted and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted)

    model.eval().merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, original, rtol=1e-4, atol=1e-4)


def test_trained_norm(mamba2):
    """PEFT wraps a module that it trains whole; such a norm is called, not read."""
    model = peft.get_peft_model(
        mamba2, peft.LoraConfig(r=4, target_modules=["in_proj"], modules_to_save=["mixer.norm"])
    ).eval()
    with torch.no_grad():
        for mixer in mixers(model):
            assert type(mixer.norm).__name__ == "ModulesToSaveWrapper"
            mixer.norm.modules_to_save["default"].weight.mul_(1.5)
    exact, _ = run_exact(model, tokens(2, 9))
    with torch.no_grad():
        original = model(input_ids=tokens(2, 9)).logits
        fastmamba.patch(model)
        actual = model(input_ids=tokens(2, 9)).logits
    assert_golden(actual, original, exact)
    assert all(layer.original_calls == {} for layer in fastmamba.report(model).layers)


class Int8Linear(nn.Module):
    """A linear with int8 weights, one scale a row: there is no float weight for anybody to read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def test_quantised_projections(main_model):
    for mixer in mixers(main_model):
        mixer.in_proj, mixer.out_proj = Int8Linear(mixer.in_proj), Int8Linear(mixer.out_proj)
    ids = tokens(2, 20)
    exact, _ = run_exact(main_model, ids)
    original, _ = run(main_model, ids)
    fast = copy.deepcopy(main_model)
    assert fastmamba.patch(fast).patched == len(mixers(fast))
    assert_golden(run(fast, ids)[0], original, exact)
    assert all(layer.original_calls == {} for layer in fastmamba.report(fast).layers)
