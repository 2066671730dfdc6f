"""A stand-in for CUDA graphs that needs no GPU: it notes the operators of a forward and runs them again, in place.

What it shares with a CUDA graph is what the tests are about: a replay reads the memory that the recording read, and
writes the memory that it wrote, and nothing of the Python in between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmamba.hf import recording, tape


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function(*args, **kwargs)
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        written = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        # Views show the memory that they view: only what is new has to be written again.
        new = [leaf for leaf in written if leaf.untyped_storage().data_ptr() not in inputs]
        if new or function._schema.is_mutable:
            self.notes.append((function, args, kwargs, new))
        return output

    def replay(self) -> None:
        for function, args, kwargs, new in self.notes:
            output = function(*args, **kwargs)
            if new:
                fresh = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                for target, source in zip(new, fresh, strict=True):
                    target.copy_(source)


class CopiedStates:
    """The states of a cache, copied to where the recording has them and back: no table of addresses on a CPU."""

    def __init__(self, states: list[tuple[Tensor, Tensor]]) -> None:
        self._slots = [tape.StateSlot(torch.zeros_like(conv), torch.zeros_like(ssm), None) for conv, ssm in states]
        self._bound: list[tuple[Tensor, Tensor]] = []

    def slots(self) -> list[tape.StateSlot]:
        return self._slots

    def recorded(self) -> None:
        pass

    def bind(self, states: list[tuple[Tensor, Tensor]]) -> None:
        self._bound = [(conv.detach(), ssm.detach()) for conv, ssm in states]

    def start(self) -> None:
        for slot, (conv, ssm) in zip(self._slots, self._bound, strict=True):
            slot.conv.copy_(conv)
            slot.ssm.copy_(ssm)

    def done(self) -> None:
        for slot, (conv, ssm) in zip(self._slots, self._bound, strict=True):
            conv.copy_(slot.conv)
            ssm.copy_(slot.ssm)


class FakeCapture:
    """As `CudaCapture`."""

    table = CopiedStates
    fails: str | None = None
    """An error to raise in the middle of a capture."""

    def __init__(self, device: torch.device) -> None:
        self._noting: _Noting | None = None
        self._reserved = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._noting is not None:
                self._noting.__exit__(None, None, None)
                self._noting = None

    def warmed_up(self) -> None:
        assert not torch.is_grad_enabled()

    def begin(self) -> None:
        self._noting = _Noting()
        self._noting.__enter__()
        if self.fails:
            raise RuntimeError(self.fails)

    def end(self) -> Callable[[], None]:
        noting, self._noting = self._noting, None
        assert noting is not None
        noting.__exit__(None, None, None)
        self._reserved += 1 << 20
        return noting.replay

    def reserved(self) -> int:
        return self._reserved


def idle() -> bool:
    """Whether nothing of a recording is left over."""
    return not recording.lock.locked() and recording._states is None
