"""Small models of every supported family, and the comparison with a float64 run of the original code."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 16}

# Family -> model class, configuration. Two or more groups and odd details on purpose.
MODELS = {
    "mamba2": (
        "Mamba2",
        {
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "use_bias": True,
            "time_step_limit": (0.0, 0.2),
        },
    ),
    "granite": (
        "GraniteMoeHybrid",
        {
            **ATTENTION,
            **MAMBA,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    ),
    "bamba": ("Bamba", {**ATTENTION, **MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "nemotron_h": (
        "NemotronH",
        {
            **ATTENTION,
            "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 16,
            "head_dim": 8,
            "use_bias": True,
            "time_step_min": 0.03,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **ATTENTION,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_mem_blocks": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 2,
            "mamba_d_state": 16,
            "chunk_size": 16,
            "time_step_min": 0.03,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            **ATTENTION,
            **MAMBA,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "ssm_in_multiplier": 1.3,
            "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.05],
        },
    ),
}
# The other ways FalconH1 treats the gate.
MODELS["falcon_h1_norm_first"] = ("FalconH1", {**MODELS["falcon_h1"][1], "mamba_norm_before_gate": True})
MODELS["falcon_h1_no_norm"] = ("FalconH1", {**MODELS["falcon_h1"][1], "mamba_rms_norm": False})

MAIN = ("mamba2", "granite")


def build(name: str, seed: int = 0, **changes: object) -> nn.Module:
    """A causal language model in eval mode, with weights in realistic ranges."""
    prefix, settings = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **settings, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    randomise(model, seed)
    model.generation_config.eos_token_id = None  # generate all the tokens that are asked for
    return model


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "A_log":
            value = uniform(parameter.shape, 1, 16).log()
        elif last == "dt_bias":
            dt = uniform(parameter.shape, math.log(1e-3), math.log(0.3)).exp()
            value = dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
        elif parameter.ndim == 1:
            centre = 0.0 if last == "bias" else 1.0
            value = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
        else:
            value = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
        parameter.copy_(value)


def mixers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "A_log")]


def skip_if_one_token_fails(model: nn.Module) -> None:
    """Skip where FalconH1's own norm drops the token axis of a one-token call, and so mixes the rows of a batch."""
    norm, gate = mixers(model)[0].norm, torch.zeros(2, 1, 64)
    if not isinstance(norm, nn.Identity) and norm(gate.clone(), gate).shape != gate.shape:
        pytest.skip(f"one-token calls of FalconH1 are broken in transformers {transformers.__version__}")


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def padding(lengths: list[int], total: int, side: str) -> Tensor:
    """A mask (B, T) of rows with the given numbers of tokens."""
    position = torch.arange(total)
    rows = [position >= total - length if side == "left" else position < length for length in lengths]
    return torch.stack(rows).long()


def run(model: nn.Module, ids: Tensor, cache: object = None, **kwargs: object) -> tuple[Tensor, object]:
    """Logits and cache of one call without gradients."""
    name = "cache_params" if type(model).__name__.startswith("Mamba2") else "past_key_values"
    if cache is not None:
        kwargs[name] = cache
    with torch.no_grad():
        output = model(input_ids=ids, **{"use_cache": True, **kwargs})
    return output.logits, getattr(output, name, None)


class Float64(TorchFunctionMode):
    """Run transformers' code in float64 throughout: its casts to float32 become casts to float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        if function is Tensor.float:
            return args[0].double()
        if function is Tensor.to:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return function(*args, **kwargs)


def run_exact(model: nn.Module, ids: Tensor, cache: object = None, **kwargs: object) -> tuple[Tensor, object]:
    """The same from a float64 copy of an unpatched model, all in float64."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the grouped one has no float64
    with Float64():
        return run(model, ids, cache, **kwargs)


def assert_golden(actual: Tensor, original: Tensor, exact: Tensor, factor: float = 2.0, limit: float = 1e-4) -> None:
    """Check that `actual` errs no more than `factor` times as much as the original code does in the same precision.

    Errors are root mean squares: the largest of few elements is luck, and one wrong element still shows a thousandfold.
    Where the original happens to be almost exact, 16 roundings are allowed. `limit` bounds its own relative error, so
    that a comparison with something else than its exact result cannot pass.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == original.shape
    assert actual.dtype == original.dtype
    scale = _rms(exact)
    original_error, error = _rms(original - exact), _rms(actual - exact)
    assert original_error <= limit * scale, f"the original errs {original_error:.3g} of {scale:.3g}"
    allowed = max(factor * original_error, 16 * torch.finfo(original.dtype).eps * scale)
    assert error <= allowed, f"error {error:.3g}, where the original errs {original_error:.3g}"


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()
