"""What the GPU's time in a call goes to, by kind of kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first that a kernel's name matches. "everything else" is eager PyTorch: casts, copies, elementwise, reductions.
KINDS = (
    (
        "SSD",
        r"_ssd|ssd_|^(_|_scores_|_own_scores_|wide_)kernel$|_chunk_(cumsum|scan|state)|_bmm_chunk|_state_pass|selective_state",
    ),
    ("attention", r"flash|fmha|attention|sdpa|cudnn_generated"),
    ("convolution", r"_conv_kernel|causal_conv|conv_depthwise|conv1d|convolve|cudnn"),
    ("norms", r"_norm_kernel|layer_norm|rms_norm|norm_fwd"),
    ("MLP gate", r"_silu_and_mul"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|gemv|grouped|xmma|_moe_(up|down)"),
    ("routing", r"_moe_"),
    ("everything else", r""),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def gpu_time(call: Callable[[], object]) -> dict[str, Any]:
    """Run `call` once under PyTorch's profiler.

    Returns:
        "busy_ms", the sum over all kernels; "launches"; "kinds", kind -> ms; "largest", the ten kernels that take most.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.self_device_time_total:
            times[event.key] += event.self_device_time_total / 1e3
            launches[event.key] += event.count
    kinds: Counter[str] = Counter()
    for kernel, ms in times.items():
        kinds[kind_of(kernel)] += ms
    return {
        "busy_ms": sum(times.values()),
        "launches": sum(launches.values()),
        "kinds": dict(kinds),
        "largest": {kernel[:120]: [ms, launches[kernel]] for kernel, ms in times.most_common(10)},
    }
