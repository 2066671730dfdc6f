"""CUDA graphs on a GPU: the bits of the eager patched model, whatever happens to caches, batches and streams."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import fastmamba
from fastmamba.hf.graphs import session_of
from tests.hf.models import MAIN, build, mixers, padding, run, tokens
from tests.hf.test_gpu import REAL_HEADS

pytestmark = pytest.mark.gpu

FAMILIES = (*MAIN, "bamba", "nemotron_h", "falcon_h1")
OPTIONS = {"max_new_tokens": 48, "do_sample": False}


def pair(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Patched without graphs, and with."""
    model = build(name, seed, **REAL_HEADS.get(name, {})).cuda().to(dtype)
    eager, fast = copy.deepcopy(model), copy.deepcopy(model)
    fastmamba.patch(eager, cuda_graphs="off")
    fastmamba.patch(fast)
    return eager, fast


def graphs(model: nn.Module) -> fastmamba.GraphReport:
    (found,) = fastmamba.report(model).graphs
    return found


def ids(batch: int, length: int = 20, seed: int = 1) -> torch.Tensor:
    return tokens(batch, length, seed).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy(name: str, dtype: torch.dtype) -> None:
    """Prompts and batch sizes in turn, each a new cache, two models alternating."""
    eager, fast = pair(name, dtype)
    other_eager, other = pair(name, dtype, seed=7)
    for seed, batch in enumerate((1, 1, 3, 1, 8, 3)):
        for a, b in ((eager, fast), (other_eager, other)):
            prompt = ids(batch, 5 + 11 * seed, seed)
            assert torch.equal(b.generate(prompt, **OPTIONS), a.generate(prompt, **OPTIONS))
    for model in (fast, other):
        assert graphs(model).recorded == 3 and graphs(model).replays == 6 * 47
        assert graphs(model).eager_calls == {}


WAYS = {
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3},
    "processors": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", MAIN)
def test_generate(name: str, way: str) -> None:
    """In a left-padded batch."""
    eager, fast = pair(name)
    mask = padding([20, 11, 17], 20, "left").cuda()
    outputs = []
    for model in (eager, fast):
        torch.manual_seed(3)
        outputs.append(model.generate(ids(3), attention_mask=mask, **{**OPTIONS, **WAYS[way]}))
    assert torch.equal(*outputs)
    assert graphs(fast).replays == 47 and graphs(fast).eager_calls == {}


@pytest.mark.parametrize("name", MAIN)
def test_failed_generation(name: str) -> None:
    """A streamer that fails in the middle; the next generation is as if nothing had been."""

    class Fails:
        left = 10

        def put(self, value: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise InterruptedError

    eager, fast = pair(name)
    expected = eager.generate(ids(1), **OPTIONS)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            fast.generate(ids(1), streamer=Fails(), **OPTIONS)
        assert torch.equal(fast.generate(ids(1), **OPTIONS), expected)


def test_failed_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronisation inside a capture: reported, and the device and the cache are unharmed."""
    eager, fast = pair("mamba2")
    expected = eager.generate(ids(1), **OPTIONS)
    own = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: own(self, x) * (1 if x.sum().item() >= 0 else 2))
    assert torch.equal(fast.generate(ids(1), **OPTIONS), expected)
    (reason,) = graphs(fast).eager_calls
    assert reason.startswith("recording failed")
    monkeypatch.undo()
    assert torch.equal(fast.generate(ids(1), **OPTIONS), expected)


@pytest.mark.parametrize("name", MAIN)
def test_changed_weights(name: str) -> None:
    eager, fast = pair(name)
    assert torch.equal(fast.generate(ids(1), **OPTIONS), eager.generate(ids(1), **OPTIONS))
    for model in (eager, fast):
        for mixer in mixers(model):
            mixer.in_proj.weight.data = mixer.in_proj.weight.data * 1.5
            mixer.dt_bias.data.add_(0.5)
    assert torch.equal(fast.generate(ids(1), **OPTIONS), eager.generate(ids(1), **OPTIONS))
    fast.cpu()
    fast.cuda()
    assert torch.equal(fast.generate(ids(1), **OPTIONS), eager.generate(ids(1), **OPTIONS))
    assert graphs(fast).eager_calls == {}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MAIN)
def test_changed_while_a_sequence_goes_on(name: str, batch: int) -> None:
    """The last layer's weight, seen when the first layers have been launched: the rest of that token runs eagerly."""
    eager, fast = pair(name)
    results = []
    for model in (eager, fast):
        logits, cache = run(model, ids(batch))
        found = [logits]
        for t in range(6):
            if t in (2, 4):
                weight = mixers(model)[-1].out_proj.weight
                weight.data = weight.data * 1.5
            position = {} if name == "mamba2" else {"position_ids": torch.full((batch, 1), 20 + t, device="cuda")}
            found.append(run(model, ids(batch, 1, seed=t), cache, **position)[0])
        results.append(found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    if name == "mamba2" or batch == 1:  # how experts are computed outside generate() may not be recordable
        assert graphs(fast).eager_calls == {"the model has changed": 2} and graphs(fast).replays == 4


def test_streams_and_inference_mode() -> None:
    eager, fast = pair("mamba2")
    expected = eager.generate(ids(2), **OPTIONS)
    assert torch.equal(fast.generate(ids(2), **OPTIONS), expected)
    with torch.inference_mode():
        assert torch.equal(fast.generate(ids(2), **OPTIONS), expected)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = fast.generate(ids(2), **OPTIONS)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(actual, expected)
    assert graphs(fast).eager_calls == {} and graphs(fast).recorded == 1


def test_half_precision_state() -> None:
    """A cache whose states the user has rounded is another recording, not a wrong answer."""
    eager, fast = pair("mamba2")
    results = []
    for model in (eager, fast):
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            _, cache = run(model, ids(2))
            for layer in cache.layers:
                layer.recurrent_states[0] = layer.recurrent_states[0].to(dtype)
            for seed in range(4):
                found.append(run(model, ids(2, 1, seed), cache)[0])
            assert cache.layers[0].recurrent_states[0].dtype == dtype
        results.append(torch.cat(found))
    assert torch.equal(*results)
    assert graphs(fast).recorded == 2 and graphs(fast).replays == 12


def test_memory() -> None:
    """What the graphs hold is reported, and comes back with unpatch."""
    _, fast = pair("mamba2")
    fast.generate(ids(4), **OPTIONS)
    assert 0 < graphs(fast).bytes < 64 << 20
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    fastmamba.unpatch(fast)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
    assert session_of(fast) is None


def test_grouped_experts() -> None:
    """Outside generate() a mixture of experts runs in another way: recorded, or eager and reported, never wrong."""
    eager, fast = pair("granite")
    results = []
    for model in (eager, fast):
        _, cache = run(model, ids(2))
        results.append(torch.cat([run(model, ids(2, 1, seed), cache)[0] for seed in range(4)]))
    assert torch.equal(*results)
    assert graphs(fast).replays + sum(graphs(fast).eager_calls.values()) == 4


@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("name", MAIN)
def test_twenty_prompts_of_512_tokens(name: str, part: int) -> None:
    """Greedy, one prompt at a time, with all that goes on in a server in between: not one token differs.

    In parts of four prompts, for several processes: one takes minutes for all of them.
    """
    eager, fast = pair(name)
    _, other = pair(name, seed=3)
    options = {"max_new_tokens": 512, "do_sample": False}
    kept: dict[nn.Module, tuple[torch.Tensor, object]] = {}
    for seed in range(4 * part, 4 * part + 4):
        prompt = ids(1, 3 + 7 * seed, seed)
        expected = eager.generate(prompt, **options)
        assert torch.equal(fast.generate(prompt, **options), expected)
        if seed % 4 == 0:  # another model, another batch size
            other.generate(ids(1, 9, seed), **OPTIONS)
            batch = ids(1 + seed // 4, 11, seed)
            assert torch.equal(fast.generate(batch, **OPTIONS), eager.generate(batch, **OPTIONS))
        if seed % 4 == 1:  # a generation that is broken off
            with pytest.raises(InterruptedError):
                fast.generate(prompt, stopping_criteria=[_broken_off], **options)
        if seed % 4 >= 2:  # a cache from before goes on, after others have run
            for model in (eager, fast):
                so_far, cache = kept.get(model, (prompt[:, :0], None))
                past = {} if cache is None else {_cache_name(model): cache}
                found = model.generate(torch.cat([so_far, prompt], 1), return_dict_in_generate=True, **past, **OPTIONS)
                kept[model] = found.sequences, found.past_key_values
            assert torch.equal(kept[fast][0], kept[eager][0])
        assert torch.equal(fast.generate(prompt, **options), expected)
    assert set(graphs(fast).eager_calls) == set()


def _broken_off(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
    if input_ids.shape[1] % 97 == 0:
        raise InterruptedError
    return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _cache_name(model: nn.Module) -> str:
    return "cache_params" if type(model).__name__.startswith("Mamba2") else "past_key_values"
