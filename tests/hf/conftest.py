from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
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
