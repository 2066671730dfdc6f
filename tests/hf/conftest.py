from __future__ import annotations

import copy

import pytest
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
