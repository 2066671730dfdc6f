"""Recorded one-token forwards, with a stand-in for CUDA graphs: what is replayed, what is not, and when it is anew."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmamba
from fastmamba.hf import guards
from fastmamba.hf.graphs import Session
from tests.hf import fake_graphs
from tests.hf.models import build, mixers, padding, run, tokens

GRAPHED = ("mamba2", "granite", "bamba", "nemotron_h", "falcon_h1")
EXPERTS = "batched_mm"  # what generate() decodes with on a GPU


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Session, "capture", fake_graphs.FakeCapture)
    monkeypatch.setattr(Session, "device_type", "cpu")
    monkeypatch.setattr(fake_graphs.FakeCapture, "fails", None)
    yield
    assert fake_graphs.idle()


def pair(model: nn.Module, **options: object) -> tuple[nn.Module, nn.Module]:
    """Patched without graphs, and with."""
    model.config._experts_implementation = EXPERTS
    model.eval()
    eager, fast = copy.deepcopy(model), copy.deepcopy(model)
    fastmamba.patch(eager, cuda_graphs="off", **options)
    fastmamba.patch(fast, **options)
    return eager, fast


def graphs(model: nn.Module) -> fastmamba.GraphReport:
    (found,) = fastmamba.report(model).graphs
    return found


def decode(model: nn.Module, count: int = 3, batch: int = 2, cache: object = None, seed: int = 1) -> list[torch.Tensor]:
    """Logits of a prompt and of tokens after it."""
    ids = tokens(batch, 9 + count, seed)
    logits, cache = run(model, ids[:, :9], cache, logits_to_keep=1)
    found = [logits]
    for t in range(9, 9 + count):
        position = {} if cache_name(model) == "cache_params" else {"position_ids": torch.full((batch, 1), t)}
        logits, cache = run(model, ids[:, t : t + 1], cache, **position)
        found.append(logits)
    return found


def cache_name(model: nn.Module) -> str:
    return "cache_params" if type(model).__name__.startswith("Mamba2") else "past_key_values"


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(params=GRAPHED)
def graphed(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.mark.parametrize(
    ("attending", "cuts"), [((), [1, 5, 15]), ((5, 15, 25, 35), [1, 5, 15, 25, 35]), ((0, 20), [20])]
)
def test_parts_grow(attending: tuple[int, ...], cuts: list[int]) -> None:
    """What is looked at before the first launch is little, in a hybrid too."""
    layers = nn.ModuleList([nn.Sequential(nn.Identity()) for _ in range(40)])
    attention = [layers[i][0] for i in attending]
    mixers = [layer[0] for layer in layers if layer[0] not in attention]
    assert guards._cut(nn.ModuleDict({"layers": layers}), mixers, attention)[1] == cuts


def test_same_bits(graphed: nn.Module) -> None:
    """Batch sizes in turn: one recording each, and the same bits as without."""
    eager, fast = pair(graphed)
    for batch in (2, 1, 2, 3):
        assert_same(decode(fast, batch=batch), decode(eager, batch=batch))
    found = graphs(fast)
    assert (found.recorded, found.replays, found.eager_calls) == (3, 12, {})
    assert found.bytes > 0
    assert "3 recorded, " in str(fastmamba.report(fast)) and "12 replays" in str(fastmamba.report(fast))


def test_caches_in_turn(main_model: nn.Module) -> None:
    """Two conversations alternate on one recording; neither sees the other's state."""
    eager, fast = pair(main_model)
    results = []
    for model in (eager, fast):
        caches = [run(model, tokens(1, 7, seed))[1] for seed in (1, 2)]
        found = []
        for t in range(6):
            logits, caches[t % 2] = run(model, tokens(1, 1, seed=t), caches[t % 2])
            found.append(logits)
        results.append(found)
    assert_same(*results)
    assert graphs(fast).recorded == 1 and graphs(fast).replays == 6


def test_cache_is_updated_as_without(main_model: nn.Module) -> None:
    """In place, with the same bits, and everything else about it too."""
    eager, fast = pair(main_model)
    caches = []
    for model in (eager, fast):
        _, cache = run(model, tokens(2, 7))
        layers = [cache.layers[mixer.layer_idx] for mixer in mixers(model)]
        before = [(layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()) for layer in layers]
        for t in range(3):
            _, returned = run(model, tokens(2, 1, seed=t), cache)
            assert returned is cache
        assert before == [(layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()) for layer in layers]
        caches.append(cache)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        for name, value in vars(theirs).items():
            mine = getattr(ours, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(mine, value)
            elif isinstance(value, dict):
                assert all(
                    torch.equal(mine[k], v) if isinstance(v, torch.Tensor) else mine[k] == v for k, v in value.items()
                )
            else:
                assert mine == value


def test_changed_caches(mamba2: nn.Module) -> None:
    """Reordered as beam search does, copied, reset, moved by hand: never the state from before."""

    def script(model: nn.Module) -> list[torch.Tensor]:
        logits, cache = run(model, tokens(3, 7))
        found = [logits]

        def step(seed: int, cache: object) -> None:
            found.append(run(model, tokens(3, 1, seed), cache)[0])

        step(1, cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        step(2, cache)
        other = copy.deepcopy(cache)
        step(3, cache)
        step(3, other)
        for layer in cache.layers:
            layer.recurrent_states[0] = layer.recurrent_states[0] * 0.5
        step(4, cache)
        for layer in cache.layers:
            layer.recurrent_states[0].mul_(0.5)
        step(5, cache)
        cache.reset()
        step(6, cache)  # a first token
        step(7, cache)
        step(8, other)
        return found

    eager, fast = pair(mamba2)
    assert_same(script(fast), script(eager))
    assert graphs(fast).replays == 8 and graphs(fast).recorded == 1


def test_changed_weights(main_model: nn.Module) -> None:
    """In place: seen by the recording. Elsewhere, or another module: recorded again."""
    eager, fast = pair(main_model)

    def change_in_place(model: nn.Module) -> None:
        mixers(model)[0].A_log.add_(0.3)

    def change_data(model: nn.Module) -> None:
        mixers(model)[1].dt_bias.data = mixers(model)[1].dt_bias.data + 0.1

    def change_parameter(model: nn.Module) -> None:
        mixers(model)[0].conv1d.weight = nn.Parameter(mixers(model)[0].conv1d.weight * 1.1)

    def change_module(model: nn.Module) -> None:
        mixers(model)[0].in_proj = copy.deepcopy(mixers(model)[0].in_proj)
        mixers(model)[0].in_proj.weight.mul_(1.1)

    def change_dtype(model: nn.Module) -> None:
        model.to(torch.bfloat16)

    assert_same(decode(fast), decode(eager))
    before = decode(fast)
    for change in (change_in_place, change_data, change_parameter, change_module, change_dtype):
        with torch.no_grad():
            for model in (eager, fast):
                change(model)
        after = decode(fast)
        assert_same(after, decode(eager))
        assert not torch.equal(after[-1], before[-1])
        before = after
    assert set(graphs(fast).eager_calls) <= {"the model has changed"}


CHANGES = {
    "data": lambda weight, module, name: setattr(weight, "data", weight.data * 1.1),
    "parameter": lambda weight, module, name: setattr(module, name, nn.Parameter(weight * 1.1)),
    "norm": lambda weight, module, name: setattr(weight, "data", weight.data * 1.1),
    "in place": lambda weight, module, name: weight.mul_(1.1),
    "hook": lambda weight, module, name: module.register_forward_hook(lambda module, args, output: output * 1.1),
    "forward": lambda weight, module, name: setattr(
        module, "forward", lambda *args, own=module.forward, **kwargs: own(*args, **kwargs) * 1.1
    ),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("name", ["mamba2", "granite", "bamba", "nemotron_h", "falcon_h1"])
def test_changed_between_two_tokens(name: str, change: str) -> None:
    """In any layer, while a sequence goes on: the next token has it, whatever had been launched before it was seen."""
    deep = {
        "mamba2": {"num_hidden_layers": 9},
        "granite": {
            "num_hidden_layers": 7,
            "layer_types": ["mamba", "mamba", "attention", "mamba", "attention", "attention", "mamba"],
        },
        "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [0, 2, 3]},
        "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "mamba", "attention", "mamba"]},
        "falcon_h1": {"num_hidden_layers": 3},
    }[name]
    eager, fast = pair(build(name, **deep))
    mask = padding([7, 4], 7, "left")
    results = []
    for model in (eager, fast):
        logits, cache = run(model, tokens(2, 7), attention_mask=mask)
        found, seen = [logits], mask

        def step() -> None:
            nonlocal seen
            seen = torch.cat([seen, seen[:, -1:]], 1)  # noqa: B023
            more = {} if cache_name(model) == "cache_params" else {"attention_mask": seen}  # noqa: B023
            if more:
                more["position_ids"] = seen.sum(1, keepdim=True) - 1
            found.append(run(model, tokens(2, 1, seed=len(found)), cache, **more)[0])  # noqa: B023

        step()
        for layer in model.base_model.layers:
            step()
            kind = "RMSNorm" if change == "norm" else "Linear"  # the norm that a layer starts with
            changed = next(module for module in layer.modules() if type(module).__name__.endswith(kind))
            with torch.no_grad():
                CHANGES[change](changed.weight, changed, "weight")
            step()
            step()
        results.append(found)
    assert_same(results[1], results[0])
    assert len({round(float(logits.sum()), 3) for logits in results[0]}) > len(results[0]) / 2
    found = graphs(fast)
    reasons = set(found.eager_calls) - {"the model has changed"}
    if change == "hook":
        assert all("hook" in reason for reason in reasons)
    else:
        assert reasons == set() and found.replays + sum(found.eager_calls.values()) == len(results[0]) - 1
        cuts = name != "falcon_h1" and change != "in place"
        assert (found.eager_calls.get("the model has changed", 0) > 0) == cuts


def test_hook_while_a_sequence_goes_on(mamba2: nn.Module) -> None:
    """On the last layer, seen after the first ones have been launched: it sees that very token, once."""
    _, fast = pair(mamba2)
    _, cache = run(fast, tokens(1, 5))
    run(fast, tokens(1, 1), cache)
    seen: list[object] = []
    mixers(fast)[-1].norm.register_forward_hook(lambda *args: seen.append(None))
    run(fast, tokens(1, 1), cache)
    assert len(seen) == 1
    run(fast, tokens(1, 1), cache)
    assert len(seen) == 2 and graphs(fast).eager_calls["the model has changed"] == 1


def test_removed_hook(mamba2: nn.Module) -> None:
    """On the last layer: recorded at the next token."""
    _, fast = pair(mamba2)
    handle = mixers(fast)[-1].norm.register_forward_hook(lambda *args: None)
    _, cache = run(fast, tokens(1, 5))
    run(fast, tokens(1, 1), cache)
    assert graphs(fast).replays == 0
    handle.remove()
    run(fast, tokens(1, 1), cache)
    assert graphs(fast).replays == 1


def test_another_weight_and_back(mamba2: nn.Module) -> None:
    """In the last layer, with a recording while the other one was there: the old one in its old place is not it."""
    eager, fast = pair(mamba2)
    results = []
    for model in (eager, fast):
        weight = mixers(model)[-1].out_proj.weight
        own = weight.data
        found = decode(model, batch=2)
        weight.data = own * 1.1
        found += decode(model, batch=1)
        weight.data = own
        found += decode(model, batch=1)
        found += decode(model, batch=2)
        results.append(found)
    assert_same(results[1], results[0])


@pytest.mark.parametrize("name", ["mamba2", "granite", "nemotron_h"])
def test_one_layers_state_moves(name: str) -> None:
    """The last one's, by hand, while a sequence goes on: seen after the first layers have been launched."""
    eager, fast = pair(build(name))
    results = []
    for model in (eager, fast):
        _, cache = run(model, tokens(2, 7))
        found = []
        for t in range(6):
            if t in (2, 4):
                layer = cache.layers[mixers(model)[-1].layer_idx]
                layer.recurrent_states[0] = layer.recurrent_states[0] * 0.5
            found.append(run(model, tokens(2, 1, seed=t), cache)[0])
        results.append(found)
    assert_same(results[1], results[0])
    assert graphs(fast).eager_calls == {"the cache has changed": 2} and graphs(fast).replays == 4


def test_hooks(main_model: nn.Module) -> None:
    """A hook has to see every call; what transformers leaves behind to collect outputs does nothing by itself."""
    eager, fast = pair(main_model)
    expected = decode(eager)
    decode(fast)
    seen: list[object] = []
    handle = mixers(fast)[0].norm.register_forward_hook(lambda *args: seen.append(None))
    decode(fast)
    assert len(seen) == 4
    assert any("hook" in reason for reason in graphs(fast).eager_calls)
    handle.remove()
    replays = graphs(fast).replays
    assert_same(decode(fast), expected)
    assert graphs(fast).replays == replays + 3
    with torch.no_grad():
        logits, cache = run(fast, tokens(2, 5), output_hidden_states=True)
        output = fast(tokens(2, 1), use_cache=True, output_hidden_states=True, **{cache_name(fast): cache})
    assert len(output.hidden_states) == 4
    assert graphs(fast).eager_calls["argument output_hidden_states"] == 1
    replays = graphs(fast).replays
    assert_same(decode(fast), expected)
    assert graphs(fast).replays == replays + 3


def test_calls_that_stay_eager(mamba2: nn.Module) -> None:
    eager, fast = pair(mamba2)
    ids = tokens(2, 1)
    _, cache = run(fast, tokens(2, 7))

    def one(**changes: object) -> object:
        return fast(**{"input_ids": ids, "cache_params": cache, "use_cache": True, **changes})

    with torch.no_grad():
        one(labels=ids)
        one(return_dict=False)
        one(use_cache=False)
        one(input_ids=None, inputs_embeds=fast.get_input_embeddings()(ids))  # not even looked at
        one(logits_to_keep=torch.tensor([0]))
        one(spam=1)
        with torch.autocast("cpu", torch.bfloat16):
            one()
        cache.activate_past_recording()
        one()
    one()
    fast.train()
    with torch.no_grad():
        one()
    names = ("labels", "return_dict", "use_cache", "logits_to_keep", "spam")
    assert graphs(fast).eager_calls == {
        **{f"argument {name}": 1 for name in names},
        "autocast": 1,
        "the cache records its past": 1,
        "gradients are enabled": 1,
        "training mode": 1,
    }
    assert graphs(fast).replays == 0


def test_changed_configuration(mamba2: nn.Module) -> None:
    """What it asks for is looked up at every call."""
    eager, fast = pair(mamba2)
    expected = decode(eager)
    decode(fast)
    for name, value in (("output_hidden_states", True), ("return_dict", False)):
        before = getattr(fast.config, name)
        _, cache = run(fast, tokens(2, 5))
        setattr(fast.config, name, value)
        with torch.no_grad():
            output = fast(tokens(2, 1), use_cache=True, cache_params=cache)
        assert isinstance(output, tuple) if name == "return_dict" else len(output.hidden_states) == 4
        assert graphs(fast).eager_calls[f"config.{name}"] == 1
        setattr(fast.config, name, before)
    _, cache = run(fast, tokens(2, 5))
    fast.config.use_cache = False
    with torch.no_grad():
        fast(tokens(2, 1), cache_params=cache, use_cache=None)
    fast.config.use_cache = True
    assert graphs(fast).eager_calls["argument use_cache"] == 1
    assert_same(decode(fast), expected)


def test_failed_recording(main_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls run without graphs, the reason is in the report, and no state was touched."""
    eager, fast = pair(main_model)
    expected = decode(eager)
    monkeypatch.setattr(fake_graphs.FakeCapture, "fails", "no capture today")
    assert_same(decode(fast), expected)
    assert graphs(fast).eager_calls == {"recording failed: RuntimeError: no capture today": 3}
    assert all("forward" not in module.__dict__ for module in fast.modules() if "Attention" in type(module).__name__)


def test_synchronising_experts() -> None:
    """Experts in a loop over those that were chosen cannot be in a graph; those of generate() on a GPU can."""
    eager, fast = pair(build("granite"))
    for model in (eager, fast):
        model.config._experts_implementation = "eager"
    assert_same(decode(fast), decode(eager))
    assert list(graphs(fast).eager_calls.values()) == [3]
    for model in (eager, fast):
        model.config._experts_implementation = EXPERTS
    assert_same(decode(fast), decode(eager))
    assert graphs(fast).replays == 3


def test_exception_in_the_middle(main_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention layer that fails, a key pressed while recording: the next generation is as if nothing had been."""
    eager, fast = pair(main_model)
    expected = decode(eager)
    monkeypatch.setattr(fake_graphs.FakeCapture, "warmed_up", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        decode(fast)
    monkeypatch.undo()
    monkeypatch.setattr(Session, "capture", fake_graphs.FakeCapture)
    monkeypatch.setattr(Session, "device_type", "cpu")
    assert_same(decode(fast), expected)
    attention = [module for module in fast.modules() if type(module).__name__.endswith("Attention")]
    if attention:
        monkeypatch.setattr(type(attention[0]), "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(fast)
        monkeypatch.undo()
        monkeypatch.setattr(Session, "capture", fake_graphs.FakeCapture)
        monkeypatch.setattr(Session, "device_type", "cpu")
        assert_same(decode(fast), expected)


def test_two_models(main_model: nn.Module) -> None:
    eager, fast = pair(main_model)
    other_eager, other = pair(build("mamba2", seed=5))
    for _ in range(2):
        assert_same(decode(fast), decode(eager))
        assert_same(decode(other), decode(other_eager))
    assert graphs(fast).replays == graphs(other).replays == 6


def test_another_thread(mamba2: nn.Module) -> None:
    """While one thread is in a call, another one's runs without graphs."""
    eager, fast = pair(mamba2)
    expected = decode(eager)
    decode(fast)
    from fastmamba.hf.graphs import session_of

    session = session_of(fast)
    found: list[list[torch.Tensor]] = []
    with session._lock:
        thread = threading.Thread(target=lambda: found.append(decode(fast)))
        thread.start()
        thread.join()
    assert_same(found[0], expected)
    assert graphs(fast).eager_calls == {"another thread is in a call": 3}


def test_memory_is_bounded(mamba2: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmamba.hf.graphs.MOST_TAPES", 2)
    eager, fast = pair(mamba2)
    for batch in (1, 2, 3, 1):
        assert_same(decode(fast, batch=batch), decode(eager, batch=batch))
    assert graphs(fast).recorded == 2 and graphs(fast).replays == 12
    monkeypatch.setattr("fastmamba.hf.graphs.MOST_BYTES", 1)
    assert_same(decode(fast, batch=4), decode(eager, batch=4))
    assert graphs(fast).recorded == 0 and list(graphs(fast).eager_calls.values()) == [3]


def test_nothing_keeps_a_cache_alive(main_model: nn.Module) -> None:
    _, fast = pair(main_model)
    _, cache = run(fast, tokens(2, 7))
    run(fast, tokens(2, 1), cache)
    run(fast, tokens(2, 1), cache)
    assert graphs(fast).replays == 2
    cache, states = weakref.ref(cache), weakref.ref(cache.layers[0].recurrent_states[0])
    gc.collect()
    assert cache() is None and states() is None


def test_patch_and_unpatch(main_model: nn.Module) -> None:
    before = [dict(module.__dict__) for module in main_model.modules()]
    assert fastmamba.patch(main_model, cuda_graphs="off").graphs == ()
    assert ("forward" in main_model.__dict__) == ("Mamba2" not in type(main_model).__name__)  # see hf/sdpa.py
    fastmamba.patch(main_model)
    assert graphs(main_model).replays == 0
    fastmamba.patch(main_model)
    decode(main_model)
    with fastmamba.patched(main_model, cuda_graphs="off"):
        assert fastmamba.report(main_model).graphs == ()
    assert fastmamba.report(main_model).graphs != ()
    fastmamba.unpatch(main_model)
    assert before == [dict(module.__dict__) for module in main_model.modules()]
    with fastmamba.patched(main_model):
        assert fastmamba.report(main_model).graphs != ()
    assert before == [dict(module.__dict__) for module in main_model.modules()]
    with pytest.raises(ValueError, match="cuda_graphs must be one of 'auto', 'off', got 'on'"):
        fastmamba.patch(main_model, cuda_graphs="on")
    assert fastmamba.patch(main_model, scope="ssd").graphs == ()


def test_copies(mamba2: nn.Module) -> None:
    """A deepcopy records for itself; a pickle is the original model."""
    eager, fast = pair(mamba2)
    expected = decode(eager)
    decode(fast)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        mixers(fast)[0].A_log.add_(1.0)
    assert_same(decode(other), expected)
    assert graphs(other).replays == 3
    loaded = pickle.loads(pickle.dumps(other))
    assert fastmamba.report(loaded).patched == 0
    assert torch.allclose(decode(loaded)[-1], expected[-1], atol=1e-4)


def test_attention_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never asks cuDNN, which plans for each length of the keys; all else does, and the switch is put back."""
    from torch.backends import cuda

    seen: list[bool] = []
    eager, fast = pair(build("granite"))
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(True)
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(cuda.cudnn_sdp_enabled())
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    try:
        for model in (eager, fast):
            decode(model)
            assert seen == [True, False, False, False] and cuda.cudnn_sdp_enabled()
            seen.clear()
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):  # the user's choice
                decode(model)
            assert seen == [True] * 4
            seen.clear()
        _, cache = run(fast, tokens(2, 3))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(fast, tokens(2, 1), cache)
        assert cuda.cudnn_sdp_enabled()
    finally:
        cuda.enable_cudnn_sdp(before)


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("way", list(WAYS))
def test_generate(graphed: nn.Module, way: str) -> None:
    """In a left-padded batch."""
    eager, fast = pair(graphed)
    ids, mask = tokens(3, 12), padding([12, 7, 10], 12, "left")
    outputs = []
    for model in (eager, fast):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, **WAYS[way]))
    if way == "scores":
        assert_same(list(outputs[1].logits), list(outputs[0].logits))
        outputs = [output.sequences for output in outputs]
    assert torch.equal(*outputs)
    assert graphs(fast).replays == 5 and graphs(fast).eager_calls == {}


def test_continued_chat(main_model: nn.Module) -> None:
    """generate() on the cache of a generate() before it."""
    eager, fast = pair(main_model)
    outputs = []
    for model in (eager, fast):
        first = model.generate(tokens(1, 9), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = first.past_key_values
        ids = torch.cat([first.sequences, tokens(1, 5, seed=2)], 1)
        outputs.append(model.generate(ids, max_new_tokens=4, do_sample=False, **{cache_name(model): cache}))
    assert torch.equal(*outputs)
    assert graphs(fast).replays >= 6


def test_assisted_decoding(main_model: nn.Module) -> None:
    """transformers refuses it for models with a state. So do patched ones, and what comes after is as ever."""
    eager, fast = pair(main_model)
    ids, options = tokens(1, 9), {"max_new_tokens": 8, "do_sample": False}
    expected = eager.generate(ids, **options)
    for assistance in ({"assistant_model": copy.deepcopy(fast)}, {"prompt_lookup_num_tokens": 2}):
        messages = []
        for model in (main_model, fast):
            with pytest.raises(ValueError, match="assisted generation is not supported") as raised:
                model.generate(ids, **assistance, **options)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
        assert torch.equal(fast.generate(ids, **options), expected)


def test_streamers_and_stopping_criteria(main_model: nn.Module) -> None:
    """Each token is handed on as it comes, and a criterion ends the generation where it would without graphs."""

    class Streamer:
        def __init__(self) -> None:
            self.values: list[torch.Tensor] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.flatten())

        def end(self) -> None:
            self.ended += 1

    eager, fast = pair(main_model)
    results = []
    for model in (eager, fast):
        for _ in range(2):
            streamer = Streamer()
            found = model.generate(
                tokens(1, 9),
                max_new_tokens=12,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] >= 15])],
            )
            assert found.shape == (1, 15) and streamer.ended == 1
            assert torch.equal(torch.cat(streamer.values), found[0])
            results.append(found)
    assert all(torch.equal(found, results[0]) for found in results)
    assert graphs(fast).replays == 10 and graphs(fast).eager_calls == {}


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_device_map(main_model: nn.Module, first: str) -> None:
    """Under accelerate's hooks, as several GPUs have them, nothing is recorded, and the report says why."""
    accelerate = pytest.importorskip("accelerate")
    eager, fast = pair(main_model)
    expected = decode(eager)
    if first == "hooks":
        fastmamba.unpatch(fast)
    accelerate.dispatch_model(fast, {"": "cpu"}, force_hooks=True)
    if first == "hooks":
        fastmamba.patch(fast)
    assert_same(decode(fast), expected)
    assert graphs(fast).replays == graphs(fast).recorded == 0
    ((reason, count),) = graphs(fast).eager_calls.items()
    assert reason.startswith("accelerate's hooks") and count == 3
    assert reason in str(fastmamba.report(fast))


def test_unpatch_lets_go(main_model: nn.Module) -> None:
    """Recordings, and the buffers that they hold."""
    _, fast = pair(main_model)
    decode(fast)
    from fastmamba.hf.graphs import session_of

    session = session_of(fast)
    (tape, ids, _) = next(iter(session._tapes.values()))
    held = [weakref.ref(thing) for thing in (session, tape, ids)]
    del session, tape, ids, _
    fastmamba.unpatch(fast)
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
