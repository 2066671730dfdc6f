"""A patched model computes what the original does."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn
from transformers import Mamba2ForCausalLM

import fastmamba
from fastmamba.hf import block_step
from tests.hf.models import MAIN, assert_golden, mixers, padding, run, run_exact, skip_if_one_token_fails, tokens
from tests.versions import SECOND

SCOPES = ("block", "mixer", "ssd")


def patch_all(model: nn.Module, scope: str = "block") -> nn.Module:
    """A patched copy."""
    model = copy.deepcopy(model)
    report = fastmamba.patch(model, scope=scope)
    assert report.patched == len(mixers(model)) > 0
    return model


def assert_no_fallback(model: nn.Module) -> None:
    assert all(layer.original_calls == {} for layer in fastmamba.report(model).layers)


def states(model: nn.Module, cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    layers = [cache.layers[mixer.layer_idx] for mixer in mixers(model)]
    return [(layer.conv_states[0], layer.recurrent_states[0]) for layer in layers]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("length", [1, 2, 5, 50])
def test_prefill(model, scope, length):
    if length == 1:
        skip_if_one_token_fails(model)
    ids = tokens(2, length)
    exact, exact_cache = run_exact(model, ids)
    original, cache = run(model, ids)
    fast = patch_all(model, scope)
    actual, fast_cache = run(fast, ids)
    assert_golden(actual, original, exact)
    for ours, theirs, true in zip(
        states(model, fast_cache), states(model, cache), states(model, exact_cache), strict=True
    ):
        for tensors in zip(ours, theirs, true, strict=True):
            assert_golden(*tensors)
    without_cache, none = run(fast, ids, use_cache=False)
    assert none is None
    assert_golden(without_cache, original, exact)
    assert_no_fallback(fast)


@pytest.mark.parametrize("scope", ["block", "mixer"])
@pytest.mark.parametrize("pieces", [None, 16])
def test_scan_output_beyond_float16(mamba2, scope, pieces):
    """The norm takes what float16 could not hold, over a sequence and in a one-token step."""
    model = mamba2.half()
    for mixer in mixers(model):
        mixer.D.data *= 1e4
        mixer.conv1d.weight.data *= 8
    fast = copy.deepcopy(model)
    fastmamba.patch(fast, scope=scope, prefill_chunk_tokens=pieces)
    ids, cache, exact_cache = tokens(2, 41), None, None
    for part in ids.split(40, dim=1):
        exact, exact_cache = run_exact(model, part, exact_cache)
        actual, cache = run(fast, part, cache)
        assert_golden(actual.half(), exact.half(), exact, limit=1e-3)
    assert_no_fallback(fast)
    scanned = copy.deepcopy(model)
    fastmamba.patch(scanned, scope="ssd")
    assert not run(scanned, ids)[0].isfinite().all()  # transformers' norm is given what was rounded


@pytest.mark.parametrize("length", [32, 50])
def test_tiles(model, length, monkeypatch):
    """The PyTorch backend takes long calls in tiles: a prefill, then padded chunks that continue it."""
    monkeypatch.setattr("fastmamba.mixer._TILE", 16)
    ids, mask = tokens(2, length + 35), padding([length + 35, 21], length + 35, "left")
    fast = patch_all(model)
    caches = [None, None, None]
    for low, high in [(0, length), (length, length + 33), (length + 33, length + 35)]:
        exact, caches[0] = run_exact(model, ids[:, low:high], caches[0], attention_mask=mask[:, :high])
        original, caches[1] = run(model, ids[:, low:high], caches[1], attention_mask=mask[:, :high])
        actual, caches[2] = run(fast, ids[:, low:high], caches[2], attention_mask=mask[:, :high])
        real = mask[:, low:high].bool()
        assert_golden(actual[real], original[real], exact[real])
    whole, _ = run(fast, ids[:, :length], use_cache=False)
    assert_golden(whole, run(model, ids[:, :length])[0], run_exact(model, ids[:, :length])[0])
    assert_no_fallback(fast)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(model, side):
    ids, mask = tokens(3, 40), padding([40, 23, 2], 40, side)
    exact, _ = run_exact(model, ids, attention_mask=mask)
    original, _ = run(model, ids, attention_mask=mask)
    fast = patch_all(model)
    actual, _ = run(fast, ids, attention_mask=mask)
    real = mask.bool()
    assert_golden(actual[real], original[real], exact[real])
    assert_no_fallback(fast)


@pytest.mark.parametrize("scope", SCOPES)
def test_continue_then_decode(model, scope):
    """A cache begun with padding, continued by several tokens, some of them padding, then one token at a time."""
    skip_if_one_token_fails(model)
    fast = patch_all(model, scope)
    pieces = [(0, 30), (30, 47), (47, 49), (49, 50), (50, 51), (51, 52)]
    ids, mask = tokens(3, 52), padding([52, 45, 50], 52, "left")
    mask[2, 30:33] = 0
    caches = [None, None, None]
    for low, high in pieces:
        arguments = {"attention_mask": mask[:, :high]}
        exact, caches[0] = run_exact(model, ids[:, low:high], caches[0], **arguments)
        original, caches[1] = run(model, ids[:, low:high], caches[1], **arguments)
        before = [tensor.data_ptr() for pair in states(model, caches[2]) for tensor in pair] if low else []
        actual, caches[2] = run(fast, ids[:, low:high], caches[2], **arguments)
        after = [tensor.data_ptr() for pair in states(model, caches[2]) for tensor in pair]
        assert before in ([], after), "the cache moved"
        real = mask[:, low:high].bool()
        assert_golden(actual[real], original[real], exact[real])
    for ours, theirs, true in zip(
        states(model, caches[2]), states(model, caches[1]), states(model, caches[0]), strict=True
    ):
        assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [torch.float32, torch.float32]
        for tensors in zip(ours, theirs, true, strict=True):
            assert_golden(*tensors)
    assert_no_fallback(fast)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
def test_triton(model, device, request):
    """The kernels, on the CPU in Triton's interpreter: a padded prefill, its continuation, a one-token step."""
    skip_if_one_token_fails(model)
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter has to be chosen before triton is imported; here the kernels run on the GPU")
    family = request.node.callspec.params["model"]
    if device == "cpu" and family not in MAIN and (SECOND or family != "falcon_h1"):
        pytest.skip("of the siblings one, on the newest transformers, is enough for Triton's interpreter")
    model = model.to(device)
    fast = copy.deepcopy(model)
    report = fastmamba.patch(fast, backend="triton")
    assert {name for layer in report.layers for name in layer.backends.values()} == {"triton"}
    ids, mask = tokens(2, 20).to(device), padding([20, 9], 20, "left").to(device)
    caches = [None, None, None]
    for low, high in [(0, 15), (15, 19), (19, 20)]:
        exact, caches[0] = run_exact(model, ids[:, low:high], caches[0], attention_mask=mask[:, :high])
        original, caches[1] = run(model, ids[:, low:high], caches[1], attention_mask=mask[:, :high])
        actual, caches[2] = run(fast, ids[:, low:high], caches[2], attention_mask=mask[:, :high])
        real = mask[:, low:high].bool()
        # The kernels' float32 matrix products may be in several passes of TF32.
        assert_golden(actual[real], original[real], exact[real], factor=4)
    assert_no_fallback(fast)


def greedy(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, chunk: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens after a prompt and a chunk of several tokens that continues its cache."""
    logits, cache = run(model, ids, attention_mask=mask, logits_to_keep=1)
    mask = torch.cat([mask, mask.new_ones(chunk.shape)], dim=1)
    logits, cache = run(model, chunk, cache, attention_mask=mask, logits_to_keep=1)
    chosen = []
    for _ in range(count):
        chosen.append(logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        logits, cache = run(model, chosen[-1], cache, attention_mask=mask)
    return torch.cat(chosen, dim=1)


def test_greedy_tokens_are_identical(main_model):
    """1,000 tokens in a padded batch of 3, a 17-token chunk that continues the cache, then 32 tokens."""
    ids, mask, chunk = tokens(3, 1000), padding([1000, 640, 77], 1000, "left"), tokens(3, 17, seed=2)
    fast = patch_all(main_model)
    assert torch.equal(greedy(fast, ids, mask, chunk, 32), greedy(main_model, ids, mask, chunk, 32))
    assert_no_fallback(fast)


GENERATE = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("way", list(GENERATE))
def test_generate(model, way):
    skip_if_one_token_fails(model)
    ids, mask = tokens(3, 20), padding([20, 11, 17], 20, "left")
    fast = patch_all(model)
    outputs = []
    for each in (model, fast):
        torch.manual_seed(3)
        outputs.append(each.generate(ids, attention_mask=mask, max_new_tokens=12, **GENERATE[way]))
    assert outputs[0].shape == (3, 32)
    assert torch.equal(*outputs)
    assert_no_fallback(fast)


def test_static_cache(main_model):
    ids = tokens(2, 20)
    fast = patch_all(main_model)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(fast.generate(ids, **options), main_model.generate(ids, **options))
    assert_no_fallback(fast)


def test_reset_cache(mamba2):
    """After a reset the old states are still there, zeroed, and must count as no states."""
    fast = patch_all(mamba2)
    ids = tokens(2, 20)
    expected, cache = run(fast, ids)
    cache.reset()
    actual, cache = run(fast, ids, cache)
    assert torch.equal(actual, expected)
    assert_no_fallback(fast)


@pytest.mark.parametrize("first", [2, 20])
def test_cache_that_records_its_past(mamba2, first):
    """Such a cache keeps every input of the convolution, for one-token steps too, until it is cropped."""
    fast = patch_all(mamba2)
    ids = tokens(2, 32)
    caches = []
    for runs, each in ((run_exact, mamba2), (run, mamba2), (run, fast)):
        _, cache = runs(each, ids[:, :1])
        cache.reset()
        cache.activate_past_recording()
        caches.append(cache)
    low = 0
    for high in (first, 24, 25, 26, 32):
        exact, _ = run_exact(mamba2, ids[:, low:high], caches[0])
        original, _ = run(mamba2, ids[:, low:high], caches[1])
        actual, _ = run(fast, ids[:, low:high], caches[2])
        assert_golden(actual, original, exact)
        for ours, theirs in zip(states(mamba2, caches[2]), states(mamba2, caches[1]), strict=True):
            assert ours[0].shape == theirs[0].shape
        if high == 25:
            for cache in caches:
                for layer in cache.layers:
                    layer.crop(0)
        low = high
    assert_no_fallback(fast)


def test_hidden_states(model):
    ids = tokens(2, 20)
    fast = patch_all(model)
    with torch.no_grad():
        theirs = model(ids, output_hidden_states=True).hidden_states
        ours = fast(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
def test_bfloat16(model, scope):
    model = model.bfloat16()
    ids = tokens(2, 50)
    exact, _ = run_exact(model, ids)
    original, cache = run(model, ids)
    fast = patch_all(model, scope)
    actual, fast_cache = run(fast, ids)
    assert actual.dtype == original.dtype
    assert_golden(actual, original, exact, factor=1.5, limit=0.1)
    for ours, theirs in zip(states(model, fast_cache), states(model, cache), strict=True):
        assert [t.dtype for t in ours] == [t.dtype for t in theirs] == [torch.bfloat16, torch.float32]
    mixer = mixers(fast)[0]
    hidden = torch.randn(2, 7, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        assert mixer(hidden).dtype == torch.bfloat16
    assert_no_fallback(fast)


def test_autocast(main_model):
    ids = tokens(2, 50)
    exact, _ = run_exact(main_model, ids)
    fast = patch_all(main_model)
    outputs = []
    for each in (main_model, fast):
        with torch.autocast("cpu", torch.bfloat16):
            logits, cache = run(each, ids)
            next_logits, cache = run(each, ids[:, :1], cache)
        outputs.append((logits, next_logits, states(each, cache)))
    (theirs, their_next, their_states), (ours, our_next, our_states) = outputs
    assert ours.dtype == theirs.dtype and our_next.dtype == their_next.dtype
    # The original's state is bfloat16 in the newer versions, because its einsum is autocast; ours stays float32.
    assert [[t.dtype for t in pair] for pair in our_states] == [[torch.bfloat16, torch.float32]] * len(our_states)
    assert len(our_states) == len(their_states)
    assert_golden(ours, theirs, exact, factor=1.5, limit=0.1)
    assert_no_fallback(fast)


def test_calls_by_keyword_and_with_unknown_arguments(model):
    fast = patch_all(model)
    mixer, hidden = mixers(fast)[0], torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = mixer(hidden)
        actual = mixer(hidden_states=hidden, cache_params=None, attention_mask=None, output_attentions=False, spam=1)
    assert torch.equal(actual, expected)
    assert_no_fallback(fast)


def test_forward_hooks_of_norm_run(mamba2):
    fast = patch_all(mamba2)
    ids, seen = tokens(2, 9), []
    expected, _ = run(fast, ids)
    handle = mixers(fast)[0].norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    actual, _ = run(fast, ids)
    handle.remove()
    assert seen == [(2, 9, 64)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_weights_are_read_at_each_call(mamba2):
    fast = patch_all(mamba2)
    ids = tokens(2, 20)
    with torch.no_grad():
        for model in (mamba2, fast):
            for mixer in mixers(model):
                mixer.A_log.data.add_(0.3)
                mixer.conv1d.weight = nn.Parameter(mixer.conv1d.weight * 1.1)
                mixer.norm.weight.mul_(0.9)
                mixer.time_step_limit = (0.01, 0.1)
    exact, _ = run_exact(mamba2, ids)
    assert_golden(run(fast, ids)[0], run(mamba2, ids)[0], exact)


@pytest.mark.parametrize("scope", SCOPES)
def test_compile(main_model, scope, monkeypatch):
    if scope != "block" and (SECOND or not isinstance(main_model, Mamba2ForCausalLM)):
        pytest.skip(
            "ten seconds, and the mixer's forwards are those that Mamba2 is traced with on the newest transformers"
        )

    def untraceable(mixer: object) -> None:
        raise AssertionError("a weak dictionary of plans, which dies under torch.compile's guards")

    monkeypatch.setattr(block_step, "plan_of", untraceable)
    ids = tokens(2, 20)
    expected, cache = run(main_model, ids)
    expected_next, _ = run(main_model, ids[:, :1], cache)
    fast = patch_all(main_model, scope)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)  # a graph break is an error
    _, cache = run(fast, ids)  # outside, so that the cache's tensors exist
    with torch.no_grad():
        for use_cache in (False, True):
            logits = compiled(ids, use_cache=use_cache).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    name = "cache_params" if hasattr(fast, "backbone") else "past_key_values"
    before = [tensor.data_ptr() for pair in states(fast, cache) for tensor in pair]
    with torch.no_grad():
        logits = compiled(ids[:, :1], use_cache=True, **{name: cache}).logits
    torch.testing.assert_close(logits, expected_next, rtol=1e-4, atol=1e-4)
    assert [tensor.data_ptr() for pair in states(fast, cache) for tensor in pair] == before


def test_compiled_mixer_has_no_graph_break(mamba2):
    mixer, hidden = mixers(patch_all(mamba2))[0], torch.randn(2, 9, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = mixer(hidden)
        actual = torch.compile(mixer, backend="aot_eager", fullgraph=True)(hidden)
    torch.testing.assert_close(actual, expected)
