"""Train the two small models that the offline evaluation uses.

    python -m evals.models.text DATA
    python -m evals.models.train DATA --model mamba2 --output evals/models/mamba2 --steps N --seed 0

On text and on recall (see recall.py) at once, at growing lengths. `--seconds` measures a few steps first and takes as
many as fit; `curve.json` records how many that were, so that `--steps` and `--stop-after` repeat the run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GraniteMoeHybridConfig, Mamba2Config

from evals.models import recall
from evals.models.forward import forward

COMMON: dict[str, Any] = dict(hidden_size=256, vocab_size=2048, bos_token_id=0, eos_token_id=0, pad_token_id=1)
CONFIGS: dict[str, dict[str, Any]] = {
    "mamba2": dict(
        **COMMON,
        num_hidden_layers=6,
        num_heads=8,
        head_dim=64,
        state_size=128,
        n_groups=1,
        chunk_size=128,
        tie_word_embeddings=True,
    ),
    "granite": dict(
        **COMMON,
        num_hidden_layers=5,
        layer_types=["mamba", "mamba", "attention", "mamba", "mamba"],
        mamba_n_heads=8,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_chunk_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.125,
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=128,
        shared_intermediate_size=128,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
    ),
}
# Until which part of the steps, how many tokens a row, how many questions in a row with facts.
LENGTHS = ((0.2, 512, 24), (0.55, 2048, 64), (0.8, 4096, 96), (1.0, 16384, 192))
MOST_FACTS = (
    32  # from 2 on, in the first quarter of the steps: from many at once a model learns to bind slowly or never
)
LEARNING_RATE, WARM_UP, DECAY_FROM = 3e-3, 0.03, 0.5


def build(name: str, seed: int, **changes: Any) -> Any:
    """A model with random weights, and states that may last: decay rates from 0.001 to 8 instead of 1 to 8."""
    torch.manual_seed(seed)
    kind = "Mamba2" if name == "mamba2" else "GraniteMoeHybrid"
    config = (Mamba2Config if name == "mamba2" else GraniteMoeHybridConfig)(**{**CONFIGS[name], **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for module in model.modules():
        if hasattr(module, "A_log"):
            heads = module.A_log.shape[0]
            dt = torch.exp(torch.empty(heads).uniform_(np.log(1e-3), np.log(1e-1)))
            with torch.no_grad():
                module.A_log.copy_(torch.linspace(np.log(1e-3), np.log(8.0), heads))
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    return model


class Batches(torch.utils.data.Dataset):
    """The batch of every step: (tokens (B, T + 1), kinds of the targets (B, T))."""

    def __init__(self, text: np.ndarray, ids: recall.Ids, steps: int, tokens: int, seed: int) -> None:
        self.text, self.ids, self.steps, self.tokens, self.seed = text, ids, steps, tokens, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        step = index
        rng = np.random.default_rng((self.seed, step))
        part = step / self.steps
        most = min(MOST_FACTS, 2 + int(MOST_FACTS * part / 0.25))
        if part < 0.5 and step % (2 if part < 0.1 else 4) == 0:
            length = min(128, self.tokens)
            rows = [recall.dense(rng, self.ids, length, most) for _ in range(self.tokens // length)]
        else:
            length, asks = next((length, asks) for until, length, asks in LENGTHS if part < until)
            length = min(length, self.tokens)
            count = self.tokens // length
            with_facts = (count + 1) // 2
            asks = min(asks, length // 8)
            rows = [recall.strewn(rng, self.text, self.ids, length, asks, most) for _ in range(with_facts)]
            rows += [recall.plain(rng, self.text, length) for _ in range(count - with_facts)]
        return tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))  # type: ignore[return-value]


def losses(model: Any, row: Tensor, kinds: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of the text, mean loss of the answers, load-balancing loss."""
    logits, balance = forward(model, row[:, :-1], dropout)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), row[:, 1:].flatten(), reduction="none")
    text, answer = ((kinds.flatten() == kind).float() for kind in (recall.TEXT, recall.ANSWER))
    return (loss * text).sum() / text.sum().clamp(min=1), (loss * answer).sum() / answer.sum().clamp(min=1), balance


@torch.no_grad()
def recalled(model: Any, text: np.ndarray, ids: recall.Ids, length: int, rows: int, device: str) -> float:
    """Share of right answers `length` tokens after the facts."""
    rng = np.random.default_rng((7, length))
    right = total = 0
    for _ in range(rows):
        row, kinds = (torch.from_numpy(part)[None].to(device) for part in recall.distant(rng, text, ids, length))
        logits, _ = forward(model, row[:, :-1])
        asked = kinds == recall.ANSWER
        right += int((logits.argmax(-1) == row[:, 1:])[asked].sum())
        total += int(asked.sum())
    return right / total


@torch.no_grad()
def held_out_loss(model: Any, text: np.ndarray, device: str, length: int = 1024, rows: int = 128) -> float:
    """Mean loss, in nats a token, of held-out text in rows of `length` tokens."""
    rows = min(rows, (len(text) - 1) // length)
    total = 0.0
    for row in range(rows):
        piece = torch.from_numpy(text[row * length : (row + 1) * length + 1].astype(np.int64)).to(device)
        logits, _ = forward(model, piece[None, :-1])
        total += F.cross_entropy(logits[0].float(), piece[1:]).item()
    return total / rows


def rate(part: float) -> float:
    """Learning rate after that part of the steps: warm-up, plateau, linear decay."""
    return LEARNING_RATE * min(1.0, (part + 1e-4) / WARM_UP, (1 - part) / (1 - DECAY_FROM))


def train(arguments: argparse.Namespace) -> None:
    data, device = arguments.data, arguments.device
    text = np.fromfile(data / "train.u16", dtype=np.uint16)
    held = np.fromfile(data / "held_out.u16", dtype=np.uint16)
    ids = _ids(data)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = build(arguments.model, arguments.seed, **json.loads(arguments.change)).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16)
    curve: list[dict[str, float]] = []

    def step(batch: tuple[Tensor, Tensor], learning_rate: float) -> tuple[Tensor, Tensor]:
        row, kinds = (part.to(device, non_blocking=True) for part in batch)
        with autocast:
            language, answers, balance = losses(model, row, kinds, arguments.dropout)
        (language + answers + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        optimiser.step()
        optimiser.zero_grad()
        return language.detach(), answers.detach()

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    steps = arguments.steps
    if steps is None:  # the weights do not move while it measures
        seconds = 0.0
        for part in (0.1, 0.4, 0.7, 0.9):
            batch = Batches(text, ids, 1000, arguments.tokens, arguments.seed)[int(1000 * part) + 1]
            step(batch, 0.0)
            synchronise()
            start = time.perf_counter()
            for _ in range(3):
                step(batch, 0.0)
            synchronise()
            seconds += (time.perf_counter() - start) / 3 / 4
        optimiser.state.clear()
        left = arguments.seconds - (time.perf_counter() - began) - 8  # the rest evaluates
        steps = max(10, int(left / (1.1 * seconds)))
        print(f"{1000 * seconds:.1f} ms a step: {steps} steps", flush=True)

    loader = torch.utils.data.DataLoader(
        Batches(text, ids, steps, arguments.tokens, arguments.seed),
        batch_size=None,
        shuffle=False,
        num_workers=arguments.workers,
        prefetch_factor=8 if arguments.workers else None,
        pin_memory=device == "cuda",
    )
    index = 0
    for index, batch in enumerate(loader):
        language, answers = step(batch, rate(index / steps))
        if index % max(1, steps // 12) == 0 or index == steps - 1:
            with autocast:
                entry = {
                    "step": index,
                    "seconds": round(time.perf_counter() - began, 1),
                    "tokens a row": batch[1].shape[1],
                    "train": round(language.item(), 4),
                    "answers": round(answers.item(), 4),
                    "held out": round(held_out_loss(model, held, device, rows=32), 4),
                    **{f"recall {n}": round(recalled(model, held, ids, n, 4, device), 4) for n in arguments.lengths},
                }
            curve.append(entry)
            print(json.dumps(entry), flush=True)
        late = arguments.steps is None and time.perf_counter() - began > 1.2 * arguments.seconds
        if late or index + 1 == arguments.stop_after:
            print(f"stopped after {index + 1} of {steps} steps", flush=True)
            break

    seconds = time.perf_counter() - began
    model.to(torch.bfloat16).float()  # what is saved is what is evaluated
    with autocast:
        final = {
            "held out, nats a token": held_out_loss(model, held, device),
            "recall": {str(n): recalled(model, held, ids, n, 8 if n <= 16384 else 2, device) for n in arguments.final},
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    record = {
        "model": arguments.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "steps": steps,
        "stopped after": index + 1,
        "tokens a step": arguments.tokens,
        "dropout": arguments.dropout,
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text": json.loads((data / "text.json").read_text()),
        "final": final,
        "curve": curve,
    }
    (arguments.output / "curve.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(final), f"{seconds:.0f} s", flush=True)


def _ids(data: Path) -> recall.Ids:
    words = {
        token["content"]: token["id"] for token in json.loads((data / "tokenizer.json").read_text())["added_tokens"]
    }
    return recall.Ids(words["<ask>"], words["<key00>"], words["<value00>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="the folder that evals.models.text made")
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: as many as fit --seconds")
    parser.add_argument("--stop-after", type=int, help="leave a run of --steps early, the learning rate where it is")
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--tokens", type=int, default=32768, help="a step")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--change", default="{}", help="JSON: fields of the configuration to change")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384])
    parser.add_argument("--final", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072])
    train(parser.parse_args())


if __name__ == "__main__":
    main()
