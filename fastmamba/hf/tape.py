"""A recorded one-token forward: CUDA graphs, and between them the calls (attention) that have to stay eager.

Recording runs the model's own forward, so nothing of it is written down twice. It computes nothing: kernels are
captured, eager calls are noted, and their results are buffers that the next graph reads. The recurrent states are not
in the graphs either: kernels find them through a table of addresses, so that one tape serves every cache of its batch
size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastmamba.hf import recording

FRESH = ("attention_mask", "past_key_values", "position_embeddings", "position_ids")
"""Arguments of an eager call that each token brings anew."""


class NotRecordable(Exception):
    """The forward cannot be recorded; the message says why."""


class StateSlot:
    """A layer's states while its forward is recorded: what they look like, and where to look up where they are."""

    record_past = False

    def __init__(self, conv: Tensor, ssm: Tensor, addresses: Tensor | None) -> None:
        self.conv, self.ssm, self.addresses = conv, ssm, addresses

    def write_conv(self, inputs: Tensor) -> None:
        raise NotRecordable("a layer replaces its conv state")

    def write_ssm(self, states: Tensor) -> None:
        raise NotRecordable("a layer replaces its state")


class AddressTable:
    """Where the states are, on the device: one row a layer, (conv state, state)."""

    def __init__(self, states: list[tuple[Tensor, Tensor]]) -> None:
        self._table = torch.zeros(len(states), 2, dtype=torch.int64, device=states[0][0].device)
        scratch: dict[Any, tuple[Tensor, Tensor]] = {}
        self._slots = []
        for row, pair in zip(self._table, states, strict=True):
            form = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in pair)
            if form not in scratch:
                conv, ssm = (torch.zeros_like(tensor) for tensor in pair)
                if (conv.stride(), ssm.stride()) != (form[0][1], form[1][1]):
                    raise NotRecordable("the cache's states are not contiguous")
                scratch[form] = conv, ssm
            self._slots.append(StateSlot(*scratch[form], row))

    def slots(self) -> list[StateSlot]:
        """What to record with. States and addresses in them are those of scratch memory that all layers share."""
        self.bind([(slot.conv, slot.ssm) for slot in self._slots])
        return self._slots

    def recorded(self) -> None:
        """Let go of the scratch memory."""
        self._slots = []

    def bind(self, states: list[tuple[Tensor, Tensor]]) -> None:
        """Use these states from the next replay on."""
        addresses = [[conv.data_ptr(), ssm.data_ptr()] for conv, ssm in states]
        self._table.copy_(torch.tensor(addresses, dtype=torch.int64))

    def start(self) -> None:
        """A run begins. The kernels go to the states themselves: there is nothing to bring."""

    def done(self) -> None:
        """A run has been launched, and there is nothing to bring back."""


class CudaCapture:
    """Captures into CUDA graphs that share one memory pool: they are never replayed at the same time."""

    table = AddressTable

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record on a stream of its own, with nothing else under way on the device."""
        collecting = gc.isenabled()
        gc.disable()  # what it frees may need calls that a capture forbids
        try:
            torch.cuda.synchronize(self.device)
            with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._abandon()
                    # Also where recording failed: what has been launched still reads tensors that now go out of use.
                    self._stream.synchronize()
            torch.cuda.synchronize(self.device)
        finally:
            if collecting:
                gc.enable()

    def warmed_up(self) -> None:
        self._stream.synchronize()

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        return graph.replay

    def _abandon(self) -> None:
        """Leave a capture that failed."""
        graph, self._graph = self._graph, None
        if graph is not None:
            try:
                graph.capture_end()
            except RuntimeError:
                pass  # it says again what went wrong in the capture

    def reserved(self) -> int:
        """Bytes that PyTorch holds of the device's memory."""
        return torch.cuda.memory_reserved(self.device)


class _EagerCall:
    """A call between two graphs: it reads what the first left behind and writes what the second takes up."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        self._module, self._args, self._kwargs, self._result = module, args, kwargs, result
        self._fresh = [name for name in FRESH if name in kwargs]

    def __call__(self, fresh: dict[str, Any]) -> None:
        for name in self._fresh:
            self._kwargs[name] = fresh[name]
        try:
            output = self._module(*self._args, **self._kwargs)
        finally:
            for name in self._fresh:
                self._kwargs[name] = None  # keep no cache alive
        self._result.copy_(output[0])


class Tape:
    """One recorded forward.

    Args:
        capture: how to capture; `CudaCapture`, or a stand-in for tests.
        states: the conv state and state of each mixer, to record for states like them.
    """

    def __init__(self, capture: Any, mixers: list[nn.Module], states: list[tuple[Tensor, Tensor]]) -> None:
        self._capture, self._mixers = capture, mixers
        self._table = capture.table(states)
        self._steps: list[Callable[[dict[str, Any]], None]] = []
        self._capturing = False
        self.bytes = 0

    def record(self, forward: Callable[[], Any], eager: list[nn.Module]) -> Any:
        """Record a forward in which the modules `eager` are called as they are.

        Returns:
            What the forward returned: its tensors are those that each run writes anew.

        Raises:
            NotRecordable: with the reason.
        """
        slots = dict(zip(self._mixers, self._table.slots(), strict=True))
        before: list[tuple[dict[str, Any], Any]] = []
        recording.begin(slots)
        try:
            for module in eager:
                before.append((module.__dict__, module.__dict__.get("forward")))
                module.__dict__["forward"] = self._stand_in(module)
            with self._capture.recording():
                forward()  # compiles kernels and sets up libraries, on scratch states
                self._capture.warmed_up()
                held = self._capture.reserved()
                self._begin()
                output = forward()
                self._end()
            self.bytes = max(0, self._capture.reserved() - held)
        finally:
            recording.end()
            for attributes, own in before:
                if own is None:
                    attributes.pop("forward", None)
                else:
                    attributes["forward"] = own
            self._table.recorded()
        return output

    def _begin(self) -> None:
        self._capturing = True
        self._capture.begin()

    def _end(self) -> None:
        self._capturing = False
        replay = self._capture.end()
        self._steps.append(lambda fresh: replay())

    def _stand_in(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if recording.state_for(self._mixers[0], None) is None:
                return own(*args, **kwargs)  # another thread runs the model meanwhile
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if not self._capturing:
                return torch.zeros_like(hidden), None
            kept = dict(kwargs)
            for name, value in (*kwargs.items(), *enumerate(args)):
                if name in FRESH:
                    kept[name] = None
                elif isinstance(value, Tensor) and value is not hidden:
                    raise NotRecordable(f"{type(module).__name__} takes a tensor {name} that may change")
            self._end()
            result = torch.empty_like(hidden)
            self._steps.append(_EagerCall(module, args, kept, result))
            self._begin()
            return result, None

        return forward

    def bind(self, states: list[tuple[Tensor, Tensor]]) -> None:
        """Use these states from the next run on."""
        self._table.bind(states)

    def run(self, make_fresh: Callable[[], dict[str, Any]]) -> None:
        """Run the forward once. `make_fresh` gives a value for each of FRESH that an eager call takes.

        It is called where the first eager call needs it, while the GPU is busy with what comes before.
        """
        self._table.start()
        fresh: dict[str, Any] = {}
        for step in self._steps:
            if not fresh and isinstance(step, _EagerCall):
                fresh = make_fresh()
            step(fresh)
        self._table.done()
