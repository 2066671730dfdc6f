"""Tests marked `gpu` run where there is a CUDA device and say why where there is none.

Without one, Triton kernels run in Triton's interpreter: it has to be chosen before triton is imported.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from tests.versions import SECOND

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from triton.runtime.interpreter import InterpretedFunction

        _own_call, _called = InterpretedFunction.__call__, set()

        def _call_inside_a_kernel(function: Any, *args: Any, **kwargs: Any) -> Any:
            if function.fn in _called:
                return function.rewrite()(*args, **kwargs)
            _called.add(function.fn)
            return _own_call(function, *args, **kwargs)

        # Triton's own exchanges all of triton.language at each call of a function that a kernel calls, although the
        # launch did so, and within triton.language the first such call for good: a third to a half of the time.
        InterpretedFunction.__call__ = _call_inside_a_kernel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    operations = [item for item in items if item.path.parent.name == "ops" and "gpu" not in item.keywords]
    _leave_half_precision(operations)
    if SECOND:
        _leave_operations(operations)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look through all of it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def _case(item: pytest.Item) -> tuple[str, dict[str, Any]]:
    """The test that an item is of, and its parameters."""
    return item.nodeid.split("[")[0], item.callspec.params if hasattr(item, "callspec") else {}


def _leave_half_precision(items: list[pytest.Item]) -> None:
    """In the interpreter two cases of each test in each half precision, the first and the last: what else there is to a
    case is seen in float32.
    """
    cases: defaultdict[tuple[str, torch.dtype], list[pytest.Item]] = defaultdict(list)
    for item in items:
        name, parameters = _case(item)
        if parameters.get("backend") == "triton" and parameters.get("dtype") in (torch.float16, torch.bfloat16):
            cases[name, parameters["dtype"]].append(item)
    for found in cases.values():
        for item in found[1:-1]:
            item.add_marker(pytest.mark.skip(reason="in Triton's interpreter in float32 alone"))


def _leave_operations(items: list[pytest.Item]) -> None:
    """Beside the lowest transformers there is the lowest Triton. Operations know no transformers, and run on the same
    torch: of each test of theirs one case in the interpreter is new, of random ones a few.
    """
    known: Counter[str] = Counter()
    for item in items:
        name, parameters = _case(item)
        known[name] += parameters.get("backend") == "triton"
        if (
            parameters.get("backend") != "triton"
            or "registered" in name
            or known[name] > (8 if "random" in name else 1)
        ):
            item.add_marker(pytest.mark.skip(reason="beside the newest transformers and Triton alone"))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends: Triton on the GPU where there is one, else in its interpreter."""
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where `backend` runs."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of evals are copies of this one: others would take seconds to import what they need."""
    if torch.cuda.is_available():
        return  # a copy cannot use CUDA
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which takes 50 ms a block, few blocks of many rows for the products of a one-token step."""
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        monkeypatch.setattr("fastmamba.kernels.layer_step._shape", lambda width, itemsize: (32, 512, 4))
        monkeypatch.setattr("fastmamba.kernels.mlp_step._ROWS", (32, 32, 32))
        monkeypatch.setattr("fastmamba.kernels.mlp_step._ROWS_WITH_EXPERTS", (32, 32, 32))
