from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.hf.models import MAIN, MODELS, build

_built: dict[str, nn.Module] = {}


def _fresh(name: str) -> nn.Module:
    if name not in _built:
        _built[name] = build(name)
    return copy.deepcopy(_built[name])


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A model of each supported family, unpatched."""
    return _fresh(request.param)


@pytest.fixture(params=MAIN)
def main_model(request: pytest.FixtureRequest) -> nn.Module:
    """Mamba2 and GraniteMoeHybrid, for tests that would take long on every family."""
    return _fresh(request.param)


@pytest.fixture
def mamba2() -> nn.Module:
    return _fresh("mamba2")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """On models this small threads only wait for each other: for minutes, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def original_in_plain_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mamba_ssm is installed, transformers calls its kernels for tensors on a CPU too, and in float64."""
    if "gpu" in request.keywords or not any(map(importlib.util.find_spec, ("mamba_ssm", "causal_conv1d"))):
        return
    for prefix in {prefix for prefix, _ in MODELS.values()}:
        module = sys.modules[getattr(transformers, f"{prefix}ForCausalLM").__module__]
        for name, function in list(vars(module).items()):
            own = getattr(function, "__wrapped__", None)
            if own is not None and name.startswith(("causal_conv1d", "mamba2_", "mamba_")):
                monkeypatch.setattr(module, name, _taking_what_it_knows(own))


def _taking_what_it_knows(function: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers' own wrapper: callers name arguments that only some implementations have."""
    known = inspect.signature(function).parameters
    return lambda *args, **kwargs: function(*args, **{name: kwargs[name] for name in kwargs if name in known})
