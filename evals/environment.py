"""What a measurement has to say about where it was taken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from typing import Any

import torch

import fastmamba

PACKAGES = ("fastmamba", "torch", "triton", "transformers")
# What transformers itself picks up when it finds it, and so what the original's figures depend on.
PEERS = ("mamba_ssm", "causal_conv1d", "kernels")


def record(device: torch.device) -> dict[str, Any]:
    """Date, command, device, versions and which optional kernels transformers can find, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "peers": {name: version(name) if importlib.util.find_spec(name) else None for name in PEERS},
    }


def version(package: str) -> str | None:
    """The version of `package` that an import would give, or None where it is not installed."""
    if package == "torch":
        return torch.__version__  # carries the build (+cpu, +cu130), which the metadata may leave out
    if package == "fastmamba":
        return fastmamba.__version__  # need not be installed: the scripts run from a checkout
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present, version unknown" if importlib.util.find_spec(package) else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {os.cpu_count()} cores" if device.type == "cpu" else str(device)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def one_line(environment: dict[str, Any]) -> str:
    """The record in one line of text, for tables and plots."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    peers = ", ".join(f"{name} {number or 'absent'}" for name, number in environment["peers"].items())
    return f"{environment['device']}; {versions}; {peers}; {environment['date'][:10]}"
