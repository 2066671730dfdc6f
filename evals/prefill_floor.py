"""What a prefill would take at best: its matrix products at the rate that this GPU has for them, and one read and one
write of each activation at the rate at which it copies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MEASURED_TOKENS = 16 * 1024  # more tokens are taken in proportion


class Rates:
    """Rates of one GPU, measured when asked for and remembered."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._linear: dict[tuple[int, int, int, torch.dtype], float] = {}
        self._attention: dict[tuple[int, int, int, torch.dtype], float] = {}
        self._copy: float | None = None

    def copy(self) -> float:
        """Bytes a second of a large device copy, reads and writes together."""
        if self._copy is None:
            source = torch.empty(1 << 30, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            self._copy = 2 * source.numel() / self._seconds(lambda: target.copy_(source))
        return self._copy

    def linear(self, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
        """Seconds of a projection of `tokens` tokens."""
        measured = min(tokens, MEASURED_TOKENS)
        key = (measured, inputs, outputs, dtype)
        if key not in self._linear:
            x = torch.randn(measured, inputs, device=self.device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=self.device, dtype=dtype)
            self._linear[key] = self._seconds(lambda: nn.functional.linear(x, weight))
        return self._linear[key] * tokens / measured

    def attention(self, tokens: int, heads: int, width: int, dtype: torch.dtype) -> float:
        """Seconds of causal attention of one row of a batch."""
        measured = min(tokens, MEASURED_TOKENS)
        key = (measured, heads, width, dtype)
        if key not in self._attention:
            q = torch.randn(1, heads, measured, width, device=self.device, dtype=dtype)
            self._attention[key] = self._seconds(
                lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            )
        return self._attention[key] * (tokens / measured) ** 2

    def _seconds(self, call: Callable[[], object], repeats: int = 5) -> float:
        call()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Something for the GPU to do while the host enqueues: otherwise the host's time is in between.
            torch.cuda._sleep(200_000)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(self.device)
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


@torch.no_grad()
def floor(model: nn.Module, rates: Rates, batch: int, tokens: int) -> dict[str, float]:
    """Milliseconds at best: "matrix_ms", "attention_ms", "activations_ms", their sum "total_ms"; and "copy_tb_s".

    Counted are the layers, not the embedding and the head of one token. Experts are taken at the rate of one projection
    of all tokens that they get. Each of these reads and writes every activation once: norm with residual add,
    convolution, SSD, gated norm, MLP gate. What matrix products read and write is in their time.
    """
    body: Any = getattr(model, "base_model", model)
    config: Any = body.config
    total = batch * tokens
    matrix = attention = read_and_written = 0.0
    for module in body.layers.modules():
        name = type(module).__name__
        if isinstance(module, nn.Linear):
            matrix += rates.linear(total, module.in_features, module.out_features, module.weight.dtype)
        elif name.endswith("Experts"):
            each = total * config.num_experts_per_tok
            for weight in module.parameters():
                if weight.ndim == 3:
                    sizes = sorted(weight.shape[1:])
                    matrix += rates.linear(each, sizes[0], sizes[1], weight.dtype)
        elif name.endswith("Attention"):
            heads, width = config.num_attention_heads, module.head_dim
            attention += batch * rates.attention(tokens, heads, width, next(module.parameters()).dtype)
        elif hasattr(module, "A_log"):
            mixer: Any = module
            size = mixer.in_proj.weight.element_size()
            conv = 2 * mixer.conv_dim
            ssd = mixer.conv_dim + mixer.num_heads + mixer.intermediate_size
            read_and_written += total * size * (conv + ssd + 3 * mixer.intermediate_size)
        elif name.endswith("RMSNorm"):
            width, size = module.weight.numel(), module.weight.element_size()
            residual = 4 if getattr(config, "residual_in_fp32", False) else size
            read_and_written += total * width * 2 * (residual + size)
        elif name.endswith("MLP"):
            read_and_written += total * 3 * module.hidden_size * module.input_linear.weight.element_size()
    parts = {
        "matrix_ms": matrix * 1e3,
        "attention_ms": attention * 1e3,
        "activations_ms": read_and_written / rates.copy() * 1e3,
    }
    return parts | {"total_ms": sum(parts.values()), "copy_tb_s": rates.copy() / 1e12}
