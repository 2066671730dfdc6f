"""Modules that are read and called at less cost: the same results, and nobody is passed over."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmamba.modules import call, call_linear, child, parameter
from fastmamba.step import is_linear

X = torch.randn(2, 3, 8)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.buffered = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    found: list[Any] = []
    yield found
    nn.modules.module._global_forward_hooks.clear()
    nn.modules.module._global_forward_pre_hooks.clear()


def ways(heard: list[Any]) -> dict[str, Any]:
    def hear(module: Any, *_: Any) -> None:
        heard.append(module)

    def offload(module: Any) -> None:
        forward = module.forward
        module._hf_hook = object()
        module.forward = lambda *args, **kwargs: (heard.append(module), forward(*args, **kwargs))[1]

    return {
        "hook": lambda module: module.register_forward_hook(hear),
        "hook before": lambda module: module.register_forward_pre_hook(hear),
        "hook of all": lambda module: nn.modules.module.register_module_forward_hook(hear),
        "hook of all before": lambda module: nn.modules.module.register_module_forward_pre_hook(hear),
        "accelerate": offload,
    }


@pytest.mark.parametrize("way", list(ways([])))
def test_who_watches_a_module_hears_of_a_call(way: str, heard: list[Any]) -> None:
    for module, run in ((Inner(), call), (nn.Linear(8, 4), call_linear)):
        expected = module(X)
        ways(heard)[way](module)
        heard.clear()
        assert torch.equal(run(module, X), expected) and module in heard
        nn.modules.module._global_forward_hooks.clear()
        nn.modules.module._global_forward_pre_hooks.clear()


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Inner()
    assert torch.equal(call(module, X, scale=2.0), module(X, scale=2.0))
    for linear in (module.linear, module.buffered):
        assert torch.equal(call_linear(linear, X), linear(X))
    calls: list[Any] = []
    own = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: calls.append(self) or own(self, *args))
    call_linear(module.linear, X)  # as a tracer would have it
    assert calls == [module.linear]


def test_a_linear_layer_that_is_more_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    doubled, replaced = Doubled(8, 4), nn.Linear(8, 4)
    assert torch.equal(call_linear(doubled, X), doubled(X))
    replaced.forward = types.MethodType(lambda self, x: x + 1, replaced)  # type: ignore[method-assign]
    assert torch.equal(call_linear(replaced, X), X + 1)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    assert torch.equal(call_linear(normed, X), normed(X))


def test_reading() -> None:
    module = Inner()
    assert child(module, "linear") is module.linear and parameter(module.linear, "weight") is module.linear.weight
    assert parameter(module.buffered, "bias") is None
    normed = nn.utils.parametrizations.weight_norm(module.linear)
    assert torch.equal(parameter(normed, "weight"), normed.weight)
    module.extra = None  # type: ignore[assignment]
    assert child(module, "extra") is None
    with pytest.raises(AttributeError):
        child(module, "missing")


def test_which_weights_may_be_read() -> None:
    """Not one that is a tensor of its own kind, as quantised ones are and those that are spread over GPUs."""
    linear = nn.Linear(8, 4)
    assert is_linear(linear)
    torch._dynamo.reset()
    assert torch.compile(lambda x: x + is_linear(linear), backend="eager", fullgraph=True)(torch.zeros(())) == 1
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(type("Kind", (Tensor,), {})))
    assert not is_linear(linear)
