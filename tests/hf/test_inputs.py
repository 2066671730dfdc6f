"""Inputs of one more token: those that transformers makes, whatever is asked for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationMixin

import fastmamba
from fastmamba.hf.inputs import NAME
from tests.hf.models import build, run, tokens

FAMILIES = ("mamba2", "granite")


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    found = build(request.param).eval()
    fastmamba.patch(found)
    return found


def usual(model: Any, batch: int = 2, length: int = 7) -> tuple[Tensor, dict[str, Any]]:
    """What `generate` asks with."""
    ids = tokens(batch, length)
    _, cache = run(model, ids[:, :-1])
    kwargs: dict[str, Any] = {
        "next_sequence_length": 1,
        "use_cache": True,
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "logits_to_keep": 1,
    }
    if type(model).__name__.startswith("Mamba2"):
        return ids, {**kwargs, "cache_params": cache}
    return ids, {**kwargs, "past_key_values": cache, "position_ids": torch.arange(length).expand(batch, -1)}


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert torch.equal(ours[name], value) and ours[name].stride() == value.stride()
        else:
            assert ours[name] is value or ours[name] == value


CHANGES: dict[str, dict[str, Any]] = {
    "usual": {},
    "no mask": {"attention_mask": None},
    "first": {"is_first_iteration": True},
    "not first": {"is_first_iteration": False},
    "whole": {"next_sequence_length": None},
    "two": {"next_sequence_length": 2},
    "no cache": {"use_cache": False},
    "unknown": {"something": 3},
    "embeds": {"inputs_embeds": torch.zeros(2, 7, 8), "is_first_iteration": True},
    "masks": {"attention_mask": {"full_attention": None}},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_same_inputs(model: Any, change: str) -> None:
    ids, kwargs = usual(model)
    kwargs |= CHANGES[change]
    own = getattr(type(model), NAME)
    assert_same(getattr(model, NAME)(ids, **kwargs), own(model, ids, **kwargs))


def test_what_is_usual_is_made_here(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, kwargs = usual(model)
    asked = []
    own = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda self: asked.append(1) or iter([self.lm_head.weight]))
    made = getattr(model, NAME)(ids, **kwargs)
    assert not asked and made["input_ids"].tolist() == ids[:, -1:].tolist()
    made["input_ids"].zero_()
    assert ids.all(), "a copy"
    own(model, ids, **kwargs)
    assert asked, "transformers looks for the model's device"


def test_a_class_that_was_changed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, kwargs = usual(model)
    monkeypatch.setattr(type(model), NAME, lambda self, ids, **kwargs: "changed")
    assert getattr(model, NAME)(ids, **kwargs) == "changed"


def test_comes_and_goes(model: Any) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ids, kwargs = usual(other)
        assert_same(getattr(other, NAME)(ids, **kwargs), getattr(type(other), NAME)(other, ids, **kwargs))
        fastmamba.patch(other)
        fastmamba.unpatch(other)
        assert getattr(other, NAME) == getattr(type(other), NAME).__get__(other)
    fastmamba.unpatch(model)
    assert NAME not in model.__dict__
    with fastmamba.patched(model, cuda_graphs="off"):
        assert NAME not in model.__dict__
    with fastmamba.patched(model):
        assert NAME in model.__dict__
    assert NAME not in model.__dict__


def test_what_the_user_has_put_there_stays(model: Any) -> None:
    fastmamba.unpatch(model)
    own = model.__dict__[NAME] = lambda ids, **kwargs: "the user's"
    fastmamba.patch(model)
    assert model.__dict__[NAME] is own
    fastmamba.unpatch(model)
    assert model.__dict__[NAME] is own
