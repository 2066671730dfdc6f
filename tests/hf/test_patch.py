"""Patching, unpatching, copying and reporting: what patch() touches, and what it does not."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastmamba
from fastmamba.hf.families import FAMILIES
from fastmamba.hf.report import _warned
from tests.hf.models import build, mixers, run, run_exact, tokens


def snapshot(model: nn.Module) -> list[tuple[nn.Module, dict]]:
    """Every module's __dict__, and that of the wrapper that accelerate makes of its forward."""
    found = []
    for module in model.modules():
        found.append((module, dict(vars(module))))
        wrapper = vars(module).get("forward")
        if isinstance(wrapper, functools.partial):
            found.append((wrapper, dict(vars(wrapper))))
    return found


def is_unchanged(before: list[tuple[object, dict]]) -> bool:
    return all(vars(thing) == attributes for thing, attributes in before)


def patched_count(model: nn.Module) -> int:
    return fastmamba.report(model).patched


def test_only_the_instance_changes(model):
    before, other = snapshot(model), copy.deepcopy(model)
    classes = [(module, type(module), dict(vars(type(module)))) for module in model.modules()]
    modeling = sys.modules[type(mixers(model)[0]).__module__]
    names, keys = dict(vars(modeling)), list(model.state_dict())
    for scope in ("block", "mixer", "ssd"):
        fastmamba.patch(model, scope=scope)
        run(model, tokens(1, 5))
    changed = [thing for thing, attributes in before if vars(thing) != attributes]
    assert changed == mixers(model)
    for module, attributes in before:
        added = {key: value for key, value in vars(module).items() if key not in attributes}
        assert list(added) == (["forward"] if module in changed else [])
    assert all(type(module) is cls and dict(vars(cls)) == attributes for module, cls, attributes in classes)
    assert dict(vars(modeling)) == names
    assert list(model.state_dict()) == keys
    assert patched_count(other) == 0
    assert fastmamba.unpatch(model) == len(changed)
    assert is_unchanged(before)
    assert fastmamba.unpatch(model) == 0


def test_bound_method_is_called_forward(mamba2):
    fastmamba.patch(mamba2)
    for mixer in mixers(mamba2):
        assert isinstance(mixer.forward, types.MethodType)
        assert mixer.forward.__self__ is mixer
        assert mixer.forward.__name__ == "forward"


def test_patch_is_idempotent_and_rebinds(mamba2):
    before, ids = snapshot(mamba2), tokens(1, 9)
    first = fastmamba.patch(mamba2)
    assert fastmamba.patch(mamba2) == first
    report = fastmamba.patch(mamba2, scope="ssd", backend="torch")
    assert {layer.scope for layer in report.layers} == {"ssd"}
    assert [layer.backends for layer in report.layers] == [{"ssd": "torch"}] * 3
    run(mamba2, ids)
    assert fastmamba.unpatch(mamba2) == 3
    assert is_unchanged(before)


def test_patched_restores(mamba2):
    before, ids = snapshot(mamba2), tokens(1, 9)
    with fastmamba.patched(mamba2, scope="mixer") as report:
        assert report.patched == patched_count(mamba2) == 3
        run(mamba2, ids)
    assert is_unchanged(before)
    with pytest.raises(KeyError, match="spam"), fastmamba.patched(mamba2):
        raise KeyError("spam")
    assert is_unchanged(before)
    with pytest.raises(ValueError, match="scope"), fastmamba.patched(mamba2, scope="spam"):
        pytest.fail("the block must not run")
    assert is_unchanged(before)


def test_patched_on_a_patched_model(mamba2):
    fastmamba.patch(mamba2, scope="ssd")
    before = snapshot(mamba2)
    with fastmamba.patched(mamba2, scope="mixer"):
        assert {layer.scope for layer in fastmamba.report(mamba2).layers} == {"mixer"}
    assert is_unchanged(before)
    assert {layer.scope for layer in fastmamba.report(mamba2).layers} == {"ssd"}


def test_deepcopy_stays_patched(mamba2):
    ids = tokens(1, 9)
    expected, _ = run(mamba2, ids)
    fastmamba.patch(mamba2)
    fast, _ = run(mamba2, ids)
    twin = copy.deepcopy(mamba2)
    assert patched_count(twin) == 3
    for mixer, twin_mixer in zip(mixers(mamba2), mixers(twin), strict=True):
        assert mixer.forward.__self__ is mixer
        assert twin_mixer.forward.__self__ is twin_mixer
    assert torch.equal(run(twin, ids)[0], fast)
    with torch.no_grad():
        mixers(twin)[0].D.zero_()
    assert not torch.equal(run(twin, ids)[0], fast)
    assert torch.equal(run(mamba2, ids)[0], fast)
    assert fastmamba.unpatch(twin) == 3
    assert patched_count(mamba2) == 3
    with torch.no_grad():
        mixers(twin)[0].D.copy_(mixers(mamba2)[0].D)
    assert torch.equal(run(twin, ids)[0], expected)


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickle_loads_unpatched(main_model, way):
    ids = tokens(1, 9)
    expected, _ = run(main_model, ids)
    layers = fastmamba.patch(main_model).patched
    fast, _ = run(main_model, ids)
    if way == "pickle":
        loaded = pickle.loads(pickle.dumps(main_model))
    else:
        buffer = io.BytesIO()
        torch.save(main_model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert patched_count(loaded) == 0
    assert torch.equal(run(loaded, ids)[0], expected)
    before = snapshot(loaded)
    assert fastmamba.patch(loaded).patched == layers
    assert torch.equal(run(loaded, ids)[0], fast)
    assert fastmamba.unpatch(loaded) == layers
    assert is_unchanged(before)


def test_pickle_loads_where_fastmamba_is_missing(mamba2, tmp_path, monkeypatch):
    ids = tokens(1, 9)
    expected, _ = run(mamba2, ids)
    fastmamba.patch(mamba2)
    torch.save(mamba2, tmp_path / "model.pt")
    for name in [name for name in sys.modules if name.split(".")[0] == "fastmamba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastmamba", None)  # an import of it fails
    with pytest.raises(ImportError):
        importlib.import_module("fastmamba.hf.patch")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded, ids)[0], expected)


def test_save_pretrained(mamba2, tmp_path):
    ids = tokens(1, 9)
    expected, _ = run(mamba2, ids)
    fastmamba.patch(mamba2)
    mamba2.save_pretrained(tmp_path)
    loaded = type(mamba2).from_pretrained(tmp_path).eval()
    assert patched_count(loaded) == 0
    assert torch.equal(run(loaded, ids)[0], expected)


# --- what is left alone ---


def test_subclass(mamba2):
    first, second, third = mixers(mamba2)

    class Plain(type(first)):
        pass

    class Own(type(first)):
        def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs) * 2

    first.__class__, second.__class__ = Plain, Own
    ids = tokens(1, 9)
    expected, _ = run(mamba2, ids)
    report = fastmamba.patch(mamba2)
    assert [layer.status for layer in report.layers] == ["fast", "original", "fast"]
    assert report.layers[1].reason == "Own overrides forward"
    torch.testing.assert_close(run(mamba2, ids)[0], expected, rtol=1e-4, atol=1e-4)


def test_replaced_forward(mamba2):
    mixer = mixers(mamba2)[1]
    original = mixer.forward
    mixer.forward = lambda *args, **kwargs: original(*args, **kwargs) * 2
    before = dict(vars(mixer))
    report = fastmamba.patch(mamba2)
    assert [layer.status for layer in report.layers] == ["fast", "original", "fast"]
    assert "already replaced" in report.layers[1].reason
    assert "already replaced" in str(report)
    assert vars(mixer) == before
    assert fastmamba.unpatch(mamba2) == 2
    assert vars(mixer) == before


def test_replaced_class_forward(mamba2, monkeypatch):
    cls = type(mixers(mamba2)[0])
    original = cls.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", forward)
    report = fastmamba.patch(mamba2)
    assert report.patched == 0
    assert "of class Mamba2Mixer was replaced" in report.layers[0].reason


def test_unknown_activation():
    model = build("mamba2", hidden_act="gelu")
    report = fastmamba.patch(model)
    assert report.patched == 0
    assert "'gelu'" in report.layers[0].reason


# --- errors ---


@pytest.mark.parametrize("function", [fastmamba.patch, fastmamba.unpatch, fastmamba.report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        function("state-spaces/mamba2")


@pytest.mark.parametrize(
    ("name", "value"), [("scope", "layer"), ("scope", None), ("backend", "cuda"), ("precision", "fast")]
)
def test_unknown_option(mamba2, name, value):
    before = snapshot(mamba2)
    with pytest.raises(ValueError, match=rf"{name} must be one of '\w+', .*, got {value!r}"):
        fastmamba.patch(mamba2, **{name: value})
    with pytest.raises(TypeError, match="spam"):
        fastmamba.patch(mamba2, spam=1)
    with pytest.raises(
        ValueError, match="state_dtype must be None, torch.float32 or the model's torch.float32, got torch.float16"
    ):
        fastmamba.patch(mamba2, state_dtype=torch.float16)
    assert is_unchanged(before)


def test_unrelated_model():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no supported layer .*Mamba2Mixer"):
        fastmamba.patch(model)
    with pytest.raises(ValueError, match="Linear has no supported layer"):
        fastmamba.patch(nn.Linear(2, 2))
    assert fastmamba.unpatch(model) == 0
    assert fastmamba.report(model).layers == ()


def test_granite_without_mamba_layers():
    model = build("granite", layer_types=["attention"] * 3)
    report = fastmamba.patch(model)
    assert (report.patched, report.layers) == (0, ())
    assert "nothing to patch" in str(report)
    assert model.generate(tokens(1, 5), max_new_tokens=3).shape == (1, 8)
    with fastmamba.patched(model):
        pass


@pytest.mark.parametrize("version", ["5.14.9", "5.24.0", "4.57.1", "6.0.0", "unknown"])
def test_unsupported_version(mamba2, monkeypatch, version):
    monkeypatch.setattr("fastmamba.hf.compat.transformers.__version__", version)
    before = snapshot(mamba2)
    with pytest.raises(RuntimeError, match=rf"transformers {version} is not supported.*>=5\.15,<5\.24"):
        fastmamba.patch(mamba2)
    assert is_unchanged(before)


def test_development_version(mamba2, monkeypatch):
    monkeypatch.setattr("fastmamba.hf.compat.transformers.__version__", "5.16.0.dev0")
    assert fastmamba.patch(mamba2).patched == 3


def test_triton_where_it_cannot_run(mamba2, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = snapshot(mamba2)
    with pytest.raises(RuntimeError, match="backend='triton' needs"):
        fastmamba.patch(mamba2, backend="triton")
    assert is_unchanged(before)


def test_error_on_a_later_layer_patches_nothing(mamba2, monkeypatch):
    monkeypatch.setattr("fastmamba.hf.patch.resolve_backend", lambda backend, device: "triton")
    mixers(mamba2)[2].head_dim = 512
    before = snapshot(mamba2)
    with pytest.raises(ValueError, match="up to 256, got 512"):
        fastmamba.patch(mamba2, backend="triton")
    assert is_unchanged(before)


# --- the original runs instead ---


def reasons(model: nn.Module) -> dict[str, int]:
    return fastmamba.report(model).layers[0].original_calls


def test_gradients_outside_training_warn_once(mamba2):
    _warned.clear()
    ids = tokens(1, 9)
    expected = mamba2(ids).logits
    fastmamba.patch(mamba2)
    with pytest.warns(fastmamba.FastMambaWarning, match=r"torch\.no_grad"):
        actual = mamba2(ids).logits
    assert torch.equal(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mamba2(ids)
    assert reasons(mamba2) == {"gradients are needed": 2}
    assert "2x original: gradients are needed" in str(fastmamba.report(mamba2))
    assert reasons(copy.deepcopy(mamba2)) == {}
    fastmamba.patch(mamba2)
    assert reasons(mamba2) == {}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scope", ["block", "mixer", "ssd"])
def test_training_is_the_original(main_model, scope, checkpointing):
    fast = copy.deepcopy(main_model)
    fastmamba.patch(fast, scope=scope)
    ids, losses = tokens(2, 20), []
    for model in (main_model, fast):
        model.train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # has another name from 5.22 on
                model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, theirs), (_, ours) in zip(main_model.named_parameters(), fast.named_parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        assert theirs.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert set(reasons(fast)) == {"training mode"}


def test_frozen_model_needs_no_gradients(mamba2):
    fastmamba.patch(mamba2)
    mamba2.requires_grad_(False)
    mamba2(tokens(1, 9))
    assert reasons(mamba2) == {}


def test_gradient_of_the_input(mamba2):
    mixer = mixers(mamba2)[0].requires_grad_(False)
    hidden = torch.randn(1, 9, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(mixer(hidden).sum(), hidden)
    fastmamba.patch(mamba2)
    _warned.clear()
    with pytest.warns(fastmamba.FastMambaWarning):
        (actual,) = torch.autograd.grad(mixer(hidden).sum(), hidden)
    assert torch.equal(actual, expected)


def test_unusual_calls(mamba2):
    """Each runs the original forward, whatever that makes of it, and is counted."""
    mixer, hidden = mixers(mamba2)[0], torch.randn(2, 9, 32)
    twin = mixers(copy.deepcopy(mamba2))[0]
    fastmamba.patch(mamba2)

    def check(reason: str, *args: object, **kwargs: object) -> None:
        results = []
        for each in (twin, mixer):
            try:
                with torch.no_grad():
                    results.append(each(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
            except Exception as error:
                results.append(f"{type(error).__name__}: {error}")
        if isinstance(results[0], torch.Tensor) and not results[0].is_meta:
            assert torch.equal(*results)
        else:
            assert str(results[0]) == str(results[1])
        assert fastmamba.report(mamba2).layers[0].original_calls == {reason: 1}
        fastmamba.patch(mamba2)

    check("hidden_states is not an ordinary tensor of shape (B, T, hidden size)", hidden[0])
    check("hidden_states is not an ordinary tensor of shape (B, T, hidden size)", hidden[:0])
    check("hidden_states is not an ordinary tensor of shape (B, T, hidden size)", hidden[:, :0])
    check("weights on the meta device", hidden.to("meta"))
    check("packed sequences (seq_idx, cu_seqlens)", hidden, seq_idx=torch.zeros(2, 9, dtype=torch.int32))
    check("packed sequences (seq_idx, cu_seqlens)", hidden, cu_seqlens=torch.tensor([0, 9]))
    check("attention_mask is not of shape (B, T)", hidden, None, torch.ones(2, 1, 9))
    check("attention_mask is not of shape (B, T)", hidden, None, torch.ones(1, 9))
    check("unknown kind of cache", hidden, object())
    check("unknown kind of cache", hidden, transformers.DynamicCache())
    _, cache = run(mamba2, tokens(2, 9))
    check("one-token step with a mask", hidden[:, :1], cache, torch.tensor([[1], [0]]))
    cache.layers[0].recurrent_states[0] = cache.layers[0].recurrent_states[0].to("meta")
    check("cache on another device", hidden[:, :3], cache)


def test_cache_that_stores_states_its_own_way(mamba2):
    """A subclass may keep states in another form: they are its business."""

    class Doubled(transformers.DynamicCache):
        def update_recurrent_state(self, recurrent_states, layer_idx, *args, **kwargs):
            return super().update_recurrent_state(recurrent_states * 2, layer_idx, *args, **kwargs)

    expected, theirs = run(mamba2, tokens(1, 9), Doubled(config=mamba2.config))
    fastmamba.patch(mamba2)
    actual, ours = run(mamba2, tokens(1, 9), Doubled(config=mamba2.config))
    assert torch.equal(actual, expected)
    assert torch.equal(ours.layers[0].recurrent_states[0], theirs.layers[0].recurrent_states[0])
    assert reasons(mamba2) == {"unknown kind of cache": 1}


def test_float64(mamba2):
    exact, _ = run_exact(mamba2, tokens(1, 9))
    model = mamba2.double()
    fastmamba.patch(model)
    torch.testing.assert_close(run(model, tokens(1, 9))[0].double(), exact, rtol=1e-5, atol=1e-5)


# --- the report ---


def test_report(model):
    count = len(mixers(model))
    plain = fastmamba.report(model)
    assert (plain.patched, len(plain.layers)) == (0, count)
    assert {layer.reason for layer in plain.layers} == {"not patched"}
    report = fastmamba.patch(model)
    assert report == fastmamba.report(model)
    assert report.patched == count
    for layer in report.layers:
        assert model.get_submodule(layer.name) in mixers(model)
        assert (layer.status, layer.device, layer.reason) == ("fast", "cpu", "")
        assert layer.scope == ("mixer" if report.blocks is None else "block")
        assert set(layer.backends.values()) == {"torch"}
        assert layer.mixer in {family.mixer for family in FAMILIES}
    text = str(report)
    assert text.startswith(f"fastmamba: {count} of {count} Mamba-2 layers of {type(model).__name__} patched\n")
    assert report.layers[0].name in text


def test_report_of_mixed_layers(mamba2):
    report = fastmamba.patch(mixers(mamba2)[0])
    assert [layer.name for layer in report.layers] == [""]
    assert [layer.status for layer in fastmamba.report(mamba2).layers] == ["fast", "original", "original"]


@pytest.mark.parametrize("scope", ["block", "mixer", "ssd"])
def test_precision_and_state_dtype_reach_the_scan(scope, monkeypatch):
    """What is given to patch() is what every scan gets; float32 where the activations are of another dtype."""
    seen = []
    prefill: Any = sys.modules["fastmamba.ops.mixer_prefill"]
    scan: Any = sys.modules["fastmamba.ops.ssd"]
    for module, name in ((prefill, "run_ssd"), (scan, "run")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own: (seen.append(a[14:16]), own(*a))[1])
    model = build("mamba2").bfloat16()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for options, expected in (
            ({}, ("exact", torch.float32)),
            ({"precision": "relaxed", "state_dtype": torch.bfloat16}, ("relaxed", torch.bfloat16)),
            ({"state_dtype": torch.float32}, ("exact", torch.float32)),
        ):
            with fastmamba.patched(model, scope=scope, **options) as report:
                assert {layer.precision for layer in report.layers} == {expected[0]}
                model(input_ids=ids)
            assert seen and set(seen) == {expected}
            seen.clear()
        fastmamba.patch(model, scope=scope, state_dtype=torch.bfloat16)
        model.float()(input_ids=ids)
    assert set(seen) == {("exact", torch.float32)}


@pytest.mark.parametrize("scope", ["block", "ssd"])
def test_limits_from_a_file_are_hashed(scope, monkeypatch):
    """A config from a file has a list; an op looks its earlier calls up by what it was given."""
    seen = []
    for module, name in (("fastmamba.mixer", "mixer_prefill"), ("fastmamba.hf.forward", "ssd")):
        own = getattr(sys.modules[module], name)
        watched = lambda *a, own=own, **options: (seen.append(options["dt_limit"]), own(*a, **options))[1]  # noqa: E731
        monkeypatch.setattr(sys.modules[module], name, watched)
    model = build("mamba2", time_step_limit=[0.01, 0.1])
    fastmamba.patch(model, scope=scope)
    with torch.no_grad():
        model(input_ids=torch.arange(20)[None])
    assert set(seen) == {(0.01, 0.1)}


def test_report_names_the_kernel_of_the_scan():
    model = build("mamba2")
    report = fastmamba.patch(model, backend="triton", precision="relaxed")
    assert {layer.ssd_variant for layer in report.layers} == {"portable"}
    assert "triton (ssd: portable, relaxed)" in str(report)
    assert {layer.ssd_variant for layer in fastmamba.patch(model, backend="torch").layers} == {""}
