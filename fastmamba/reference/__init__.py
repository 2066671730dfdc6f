"""The maths of every op in plain PyTorch: CPU backend, autograd fallback and, fed float64, the oracle of the tests.

Nothing here validates its arguments (the public functions in ``fastmamba.ops`` do) or imports more than torch.
"""

from __future__ import annotations

from .causal_conv1d import causal_conv1d, causal_conv1d_update
from .gated_rms_norm import gated_rms_norm
from .layer_step import layer_step
from .mixer_step import mixer_step
from .mlp_step import mlp_step
from .moe import moe
from .recurrence import ssd_recurrence
from .ssd import ssd
from .ssd_step import ssd_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_rms_norm",
    "layer_step",
    "mixer_step",
    "mlp_step",
    "moe",
    "ssd",
    "ssd_recurrence",
    "ssd_step",
]
