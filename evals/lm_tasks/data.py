"""Documents of the local tasks, made of the text that the small models did not see (see evals/models/text.py).

lm-eval's YAML files name these functions. Everything is drawn with a fixed seed, so every run sees the same documents.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets

HERE = Path(__file__).parent
TOKENIZER = HERE.parent / "models" / "mamba2" / "tokenizer.json"
KEYS = VALUES = 64
FACTS = 24
"""How many facts a recall document states; one of them is asked for."""


def held_out() -> dict[str, list[str]]:
    """Paragraphs of each held-out part, by its name."""
    parts = json.loads((HERE / "held_out.json").read_text(encoding="utf-8"))
    return {name: text.split("\n\n") for name, text in parts.items()}


def text(documents: int = 24, **_: Any) -> dict[str, datasets.Dataset]:
    """Runs of whole paragraphs, 1,500 to 6,000 characters, for perplexity."""
    rng = random.Random(0)
    parts = [paragraphs for paragraphs in held_out().values()]
    rows = []
    for index in range(documents):
        paragraphs = parts[index % len(parts)]
        wanted, start = rng.randint(1500, 6000), rng.randrange(len(paragraphs) - 2)
        chosen: list[str] = []
        while sum(map(len, chosen)) < wanted and start + len(chosen) < len(paragraphs):
            chosen.append(paragraphs[start + len(chosen)])
        rows.append({"text": "\n\n".join(chosen)[:8000]})
    return {"test": datasets.Dataset.from_list(rows)}


def cloze(questions: int = 80, **_: Any) -> dict[str, datasets.Dataset]:
    """60 words of text; the eight words that follow, among three times eight words from elsewhere in the same part."""
    rng = random.Random(1)
    words = [" ".join(paragraphs).split() for paragraphs in held_out().values()]
    rows = []
    for index in range(questions):
        part = words[index % len(words)]
        start = rng.randrange(len(part) - 68)
        choices = [" ".join(part[start + 60 : start + 68])]
        while len(choices) < 4:
            other = rng.randrange(len(part) - 8)
            if abs(other - start) > 200:
                choices.append(" ".join(part[other : other + 8]))
        order = rng.sample(range(4), 4)
        rows.append(
            {
                "context": " ".join(part[start : start + 60]),
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
            }
        )
    return {"test": datasets.Dataset.from_list(rows)}


def recall(length: int, questions: int, **_: Any) -> dict[str, datasets.Dataset]:
    """`length` tokens of text, FACTS facts `<keyNN><valueMM>` in the first 256 of them; at the end one is asked for."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    rng = random.Random(length)
    parts = ["\n\n".join(paragraphs) for paragraphs in held_out().values()]
    rows = []
    for _question in range(questions):
        rng.shuffle(parts)
        start = rng.randrange(5000)
        body = "\n\n".join(parts)[start : start + 6 * length]
        encoded = tokenizer.encode(body)
        body = body[: encoded.offsets[length - 2 * FACTS - 2][0]]
        # Facts go behind words.
        cuts = sorted(rng.choices([i for i in range(encoded.offsets[256][0]) if body[i] == " "], k=FACTS))
        keys, values = rng.sample(range(KEYS), FACTS), [rng.randrange(VALUES) for _ in range(FACTS)]
        pieces, done = [], 0
        for cut, key, value in zip(cuts, keys, values, strict=True):
            pieces += [body[done:cut], f"<key{key:02d}><value{value:02d}>"]
            done = cut
        asked = rng.randrange(FACTS)
        prompt = "".join([*pieces, body[done:], f"<ask><key{keys[asked]:02d}>"])
        rows.append({"prompt": prompt, "answer": f"<value{values[asked]:02d}>"})
    return {"test": datasets.Dataset.from_list(rows)}
