"""patch(prefill_chunk_tokens=...): long calls in pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastmamba
from fastmamba.hf import pieces
from tests.hf.models import assert_golden, build, padding, run, run_exact, tokens


def in_pieces(model: nn.Module, most: int = 16, **options: object) -> nn.Module:
    """A patched copy, and a check that it cuts."""
    model = copy.deepcopy(model)
    fastmamba.patch(model, prefill_chunk_tokens=most, **options)
    return model


def cut(model: nn.Module) -> int:
    (found,) = fastmamba.report(model).pieces
    assert found.whole_calls == {}
    return found.cut


@pytest.mark.parametrize("length", [17, 40, 49])
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_then_decode(main_model: nn.Module, length: int, padded: bool) -> None:
    ids = tokens(2, length)
    kwargs = {"attention_mask": padding([length, length - 9], length, "left")} if padded else {}
    exact, exact_cache = run_exact(main_model, ids, **kwargs)
    original, cache = run(main_model, ids, **kwargs)
    fast = in_pieces(main_model)
    actual, fast_cache = run(fast, ids, **kwargs)
    assert_golden(actual, original, exact)
    if padded:
        kwargs = {"attention_mask": torch.cat([kwargs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)}
    nexts = [run(m, ids[:, :1], c, **kwargs)[0] for m, c in ((fast, fast_cache), (main_model, cache))]
    assert_golden(*nexts, run_exact(main_model, ids[:, :1], exact_cache, **kwargs)[0])
    assert cut(fast) == 1


def test_every_family_that_can_be_cut(model: nn.Module) -> None:
    ids = tokens(2, 37)
    if type(model).__name__.startswith("Zamba2"):
        with pytest.raises(ValueError, match="prefill_chunk_tokens cannot be used with Zamba2ForCausalLM"):
            in_pieces(model)
        return
    fast = in_pieces(model)
    assert_golden(run(fast, ids)[0], run(model, ids)[0], run_exact(model, ids)[0])
    assert cut(fast) == 1


@pytest.mark.parametrize("most", [16, 17, 36])
@pytest.mark.parametrize("length", range(17, 40, 5))
def test_no_piece_is_long_or_a_single_token(most: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = pieces._slice
    monkeypatch.setattr(pieces, "_slice", lambda k, s, e, t: seen.append(e - s) or own(k, s, e, t))
    logits = run(in_pieces(build("mamba2"), most), tokens(1, length))[0]
    assert logits.shape[1] == length and sum(seen) == (length if length > most else 0)
    assert all(2 <= piece <= most for piece in seen)


@pytest.mark.parametrize("kept", [0, 1, 5, 30, torch.tensor([3, 39, 20, 3]), torch.tensor([-1, 0])], ids=str)
def test_logits_to_keep(main_model: nn.Module, kept: object) -> None:
    fast, ids = in_pieces(main_model), tokens(1, 40)
    actual = run(fast, ids, logits_to_keep=kept)[0]
    expected = run(main_model, ids, logits_to_keep=kept)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert cut(fast) == 1


def test_other_ways_to_call(main_model: nn.Module) -> None:
    fast, ids = in_pieces(main_model), tokens(2, 40)
    expected, cache = run(main_model, ids)
    embeds = main_model.get_input_embeddings()(ids)
    close = dict(rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(inputs_embeds=embeds).logits, expected, **close)
        without = fast(ids, use_cache=False)
        torch.testing.assert_close(without.logits, expected, **close)
        assert not {"cache_params", "past_key_values"} & set(without.keys())
        # Continuing a cache, with a mask that reaches back over it.
        mask = padding([70, 60], 70, "left")
        more = tokens(2, 30, seed=2)
        results = []
        for m in (fast, main_model):
            c = run(m, ids, attention_mask=mask[:, :40])[1]
            results.append(run(m, more, c, attention_mask=mask)[0])
        torch.testing.assert_close(*results, **close)
        body = main_model.base_model
        hidden = body(ids).last_hidden_state
        torch.testing.assert_close(in_pieces(body)(ids).last_hidden_state, hidden, **close)
        ours = fast.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(ours, main_model.generate(ids, max_new_tokens=4, do_sample=False))
    assert cut(fast) == 5


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"output_hidden_states": True}, "argument output_hidden_states"),
        ({"labels": tokens(1, 40)}, "argument labels"),
        ({"return_dict": False}, "argument return_dict"),
        ({"spam": 1}, "argument spam"),
        ({"attention_mask": torch.ones(1, 1, 40, 40)}, "argument attention_mask"),
    ],
)
def test_what_asks_for_the_whole_runs_whole(main_model: nn.Module, kwargs: dict, reason: str) -> None:
    fast, ids = in_pieces(main_model), tokens(1, 40)
    with torch.no_grad():
        if "spam" not in kwargs and "attention_mask" not in kwargs:
            fast(ids, **kwargs)
        else:
            try:
                fast(ids, **kwargs)
            except (TypeError, ValueError, RuntimeError):
                pass  # as the original would
    (found,) = fastmamba.report(fast).pieces
    assert found.cut == 0 and found.whole_calls == {reason: 1}
    assert f"1x whole: {reason}" in str(fastmamba.report(fast))
    fast(ids)
    assert fastmamba.report(fast).pieces[0].whole_calls["gradients are enabled"] == 1


@pytest.mark.parametrize("tokens", [0, 15, -3, 1.5, "64", True])
def test_bad_values_are_named(mamba2: nn.Module, tokens: object) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_tokens must be an integer of at least 16"):
        fastmamba.patch(mamba2, prefill_chunk_tokens=tokens)  # type: ignore[arg-type]
    assert fastmamba.report(mamba2).patched == 0


def test_undone(mamba2: nn.Module) -> None:
    before = dict(mamba2.__dict__)
    fastmamba.patch(mamba2, prefill_chunk_tokens=32, cuda_graphs="off")
    assert [found.tokens for found in fastmamba.report(mamba2).pieces] == [32]
    with fastmamba.patched(mamba2, prefill_chunk_tokens=64):
        assert [found.tokens for found in fastmamba.report(mamba2).pieces] == [64]
    assert [found.tokens for found in fastmamba.report(mamba2).pieces] == [32]
    fastmamba.patch(mamba2)
    assert fastmamba.report(mamba2).pieces == ()
    fastmamba.unpatch(mamba2)
    assert mamba2.__dict__ == before


def test_a_mask_that_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that a piece gets on a GPU, given here on a CPU, where it is made real."""
    model = build("granite")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    fast, ids = in_pieces(model, backend="torch"), tokens(2, 40)
    seen = []
    monkeypatch.setattr(pieces, "_causal", lambda *a, own=pieces._causal: seen.append(own(*a)) or seen[-1])
    actual = run(fast, ids)[0]
    monkeypatch.undo()
    assert_golden(actual, run(model, ids)[0], run_exact(model, ids)[0])
    assert seen[0] is None and all(mask["full_attention"] is not None for mask in seen[1:])
