"""Published Mamba-2 model shapes, built with random weights: real sizes without a download."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, Mamba2Config, PreTrainedConfig, PreTrainedModel

# name: hidden size, layers. All have heads of 64 channels, state 128, one group.
_MAMBA2 = {
    "mamba2-130m": (768, 24),
    "mamba2-370m": (1024, 48),
    "mamba2-780m": (1536, 48),
    "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}

# From the published config.json of ibm-granite/granite-4.0-h-*; all have state 128 and one group.
_GRANITE: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": dict(
        hidden_size=768, num_hidden_layers=32, attention_at=(10, 13, 17, 27), mamba_n_heads=48, mamba_d_head=32,
        num_attention_heads=12, num_key_value_heads=4, shared_intermediate_size=2048, intermediate_size=2048,
        attention_multiplier=0.015625, logits_scaling=3.0, residual_multiplier=0.246,
    ),
    "granite-4.0-h-1b": dict(
        hidden_size=1536, num_hidden_layers=40, mamba_n_heads=48, mamba_d_head=64,
        num_attention_heads=12, num_key_value_heads=4, shared_intermediate_size=4096, intermediate_size=4096,
        attention_multiplier=0.0078125, logits_scaling=6.0,
    ),
    "granite-4.0-h-micro": dict(
        hidden_size=2048, num_hidden_layers=40, mamba_n_heads=64, mamba_d_head=64,
        num_attention_heads=32, num_key_value_heads=8, shared_intermediate_size=8192, intermediate_size=8192,
        attention_multiplier=0.015625, logits_scaling=8.0,
    ),
    "granite-4.0-h-tiny": dict(
        hidden_size=1536, num_hidden_layers=40, mamba_n_heads=48, mamba_d_head=64,
        num_attention_heads=12, num_key_value_heads=4, shared_intermediate_size=1024, intermediate_size=512,
        num_local_experts=64, num_experts_per_tok=6, attention_multiplier=0.0078125, logits_scaling=6.0,
    ),
    "granite-4.0-h-small": dict(
        hidden_size=4096, num_hidden_layers=40, mamba_n_heads=128, mamba_d_head=64,
        num_attention_heads=32, num_key_value_heads=8, shared_intermediate_size=1536, intermediate_size=768,
        num_local_experts=72, num_experts_per_tok=10, attention_multiplier=0.0078125, logits_scaling=16.0,
    ),
}  # fmt: skip

NAMES = (*_MAMBA2, *_GRANITE)


def config_for(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a built-in shape, cut to `layers` layers when given.

    A hybrid cut below its first attention layer keeps one, as its last layer, so that it stays a hybrid.
    """
    if layers is not None and layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if name in _MAMBA2:
        hidden, depth = _MAMBA2[name]
        return Mamba2Config(
            hidden_size=hidden,
            num_hidden_layers=depth if layers is None else min(layers, depth),
            num_heads=2 * hidden // 64,
            head_dim=64,
            state_size=128,
            n_groups=1,
            vocab_size=50288,
            initializer_range=0.02,
            tie_word_embeddings=True,
        )
    if name in _GRANITE:
        fields: dict[str, Any] = dict(_GRANITE[name])
        depth, attention_at = fields.pop("num_hidden_layers"), fields.pop("attention_at", (5, 15, 25, 35))
        types = ["attention" if i in attention_at else "mamba" for i in range(depth)][:layers]
        if len(types) > 1 and "attention" not in types:
            types[-1] = "attention"
        defaults: dict[str, Any] = dict(
            residual_multiplier=0.22, embedding_multiplier=12.0, num_local_experts=0, num_experts_per_tok=0
        )
        return GraniteMoeHybridConfig(
            **(defaults | fields),
            num_hidden_layers=len(types),
            layer_types=types,
            mamba_d_state=128,
            mamba_n_groups=1,
            max_position_embeddings=2**20,
            rms_norm_eps=1e-5,
            vocab_size=100352,
            tie_word_embeddings=True,
        )
    raise ValueError(f"no shape is called {name!r}; there are {', '.join(NAMES)}")


def build(name: str, layers: int | None, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A built-in shape with random weights, in eval mode on `device`."""
    config = config_for(name, layers)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    trained_looking_mixers(model)
    return model.eval()


@torch.no_grad()
def trained_looking_mixers(model: torch.nn.Module) -> None:
    """Give the mixers the distributions they are trained from (A in 1..16, dt in 0.001..0.1, a live convolution).

    The library's own initialisation makes the state forget within a few tokens, so that a wrong state would not show.
    """
    for module in model.modules():
        mixer: Any = module
        if not (hasattr(mixer, "A_log") and hasattr(mixer, "dt_bias")):
            continue
        mixer.A_log.copy_(torch.empty_like(mixer.A_log, dtype=torch.float32).uniform_(1, 16).log())
        dt = torch.empty_like(mixer.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        bound = mixer.conv1d.kernel_size[0] ** -0.5
        mixer.conv1d.weight.uniform_(-bound, bound)
