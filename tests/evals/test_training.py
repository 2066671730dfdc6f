"""How the small models were trained: the training forward is transformers' own, and the task is what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.lm_tasks import data
from evals.models import recall
from evals.models.forward import forward
from evals.models.ngram import KneserNey, loss
from evals.models.train import Batches, build

MODELS = Path(data.__file__).parents[1] / "models"
IDS = recall.Ids(1919, 1920, 1984)


@pytest.mark.parametrize("name", ["mamba2", "granite"])
def test_forward_is_transformers(name):
    model = build(name, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    ids = torch.randint(0, 2048, (2, 192), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        actual, _ = forward(model, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba2", "granite"])
def test_shipped_models(name):
    weights = MODELS / name / "model.safetensors"
    assert weights.stat().st_size < 12e6
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    words = tokenizer("Emma<key07><value33> was<ask><key07><|endoftext|>").input_ids
    assert [IDS.key + 7, IDS.value + 33] == words[-6:-4]
    assert [IDS.ask, IDS.key + 7, 0] == words[-3:]
    text = "\n\n".join(data.held_out()["emma"][:12])
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item()
    # 3.3 to 3.4 over all held-out text; 5-grams have 3.6.
    assert nats < 3.6
    record = json.loads((MODELS / name / "curve.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_rows():
    rng = np.random.default_rng(0)
    text = np.arange(200, 1200)
    for make in (
        lambda: recall.dense(rng, IDS, 128, 8),
        lambda: recall.strewn(rng, text, IDS, 512, 24, 8),
        lambda: recall.distant(rng, text, IDS, 1024),
    ):
        for _ in range(20):
            row, kinds = make()
            length = len(kinds)
            assert len(row) == length + 1
            known: dict[int, int] = {}
            for at in range(length):
                if kinds[at] == recall.ANSWER:
                    assert row[at - 1] == IDS.ask
                    assert known[row[at]] == row[at + 1]  # a fact stated before
                elif IDS.key <= row[at] < IDS.value and (at == 0 or row[at - 1] != IDS.ask):
                    known[row[at]] = row[at + 1]
            assert kinds[kinds == recall.ANSWER].size > 0


def test_batches_repeat():
    text = np.arange(200, 1200).astype(np.uint16)
    first, again = (Batches(text, IDS, 100, 2048, seed=3)[41] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_kneser_ney_sums_to_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, 400).tolist()
    model = KneserNey(tokens, 3, vocabulary=11)
    for context in ((1, 2), (3, 3), (10, 10)):  # the last never occurs
        total = sum(model.probability(context, token) for token in range(11))
        assert total == pytest.approx(1.0)
    assert loss(model, tokens, length=50) < math.log(9)


def test_recall_documents():
    for length in (1024, 2048):
        (row, other) = data.recall(length, 2)["test"]
        tokens = len(AutoTokenizer.from_pretrained(MODELS / "mamba2")(row["prompt"]).input_ids)
        assert abs(tokens - length) < 0.02 * length
        key = row["prompt"].rsplit("<ask>", 1)[1]
        assert row["prompt"].count(key) == 2
        assert f"{key}{row['answer']}" in row["prompt"]
        assert row != other
