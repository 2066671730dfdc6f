"""Public tensor functions: checked arguments, registered with torch.library, one backend chosen per call."""

from __future__ import annotations

from fastmamba.configs import ssd_variant
from fastmamba.ops._dispatch import BACKENDS, resolve_backend
from fastmamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from fastmamba.ops.gated_rms_norm import gated_rms_norm
from fastmamba.ops.layer_step import layer_step
from fastmamba.ops.mixer_prefill import mixer_prefill
from fastmamba.ops.mixer_step import mixer_step
from fastmamba.ops.mlp_step import mlp_step
from fastmamba.ops.moe import moe
from fastmamba.ops.rms_norm import add_rms_norm, rms_norm
from fastmamba.ops.silu_and_mul import silu_and_mul
from fastmamba.ops.ssd import PRECISIONS, ssd
from fastmamba.ops.ssd_step import ssd_step

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "layer_step",
    "mixer_prefill",
    "mixer_step",
    "mlp_step",
    "moe",
    "resolve_backend",
    "rms_norm",
    "silu_and_mul",
    "ssd",
    "ssd_step",
    "ssd_variant",
]
