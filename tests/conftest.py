"""Tests marked `gpu` run where there is a CUDA device and say why where there is none.

Without one, Triton kernels run in Triton's interpreter: it has to be chosen before triton is imported.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.versions import LOWEST

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


_HALF = (torch.float16, torch.bfloat16)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    # Triton's interpreter takes most of the tests' time, and operations know no transformers.
    once = pytest.mark.skip(reason="in Triton's interpreter, on the newest transformers alone")
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "gpu" in item.keywords:
            item.add_marker(skip)
        elif LOWEST and parameters.get("backend") == "triton":
            if parameters.get("dtype") in _HALF or "options" in parameters:
                item.add_marker(once)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends: Triton on the GPU where there is one, else in its interpreter."""
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where `backend` runs."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which takes 50 ms a block, few blocks of many rows for the products of a one-token step."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        monkeypatch.setattr("fastmamba.kernels.layer_step._shape", lambda width, itemsize: (32, 512, 4))
        monkeypatch.setattr("fastmamba.kernels.mlp_step._ROWS", (32, 32, 32))
        monkeypatch.setattr("fastmamba.kernels.mlp_step._ROWS_WITH_EXPERTS", (32, 32, 32))
