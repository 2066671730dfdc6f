"""A recorded one-token forward: CUDA graphs, and between them the calls (attention) that have to stay eager.

Recording runs the model's own forward, so nothing of it is written down twice. It computes nothing: kernels are
captured, eager calls are noted, and their results are buffers that the next graph reads. The recurrent states are not
in the graphs either: kernels find them through a table of addresses, so that one tape serves every cache of its batch
size.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Point:
    """Where a run asks whether what comes next may run, and from where the model can go on by itself if not."""

    layer: int
    """The next layer of the model's list of layers."""
    part: int
    """What comes next, counted from 1; the run asks no one before part 0."""
    hidden: Tensor
    """What that layer is given."""
    returned: int | None
    """How many things a layer returns, the hidden states first; None where it returns them alone."""


class Tape:
    """One recorded forward.

    Args:
        capture: how to capture; `CudaCapture`, or a stand-in for tests.
        states: the conv state and state of each mixer, to record for states like them.
    """

    def __init__(self, capture: Any, mixers: list[nn.Module], states: list[tuple[Tensor, Tensor]]) -> None:
        self._capture, self._mixers = capture, mixers
        self._table = capture.table(states)
        self._steps: list[Callable[[], None] | _EagerCall | Point] = []
        self._capturing = False
        self._entered: tuple[int, Tensor] | None = None  # a layer that a part begins with, and its input
        self._returned: int | None = None
        self._zeros: Tensor | None = None  # of the kernels
        self.bytes = 0

    def record(
        self, forward: Callable[[], Any], eager: list[nn.Module], layers: Sequence[nn.Module], cuts: Sequence[int]
    ) -> Any:
        """Record a forward in which the modules `eager` are called as they are.

        Args:
            layers: the model's layers, each of which takes hidden states and returns those of the next one.
            cuts: layers with which another part of the run begins, increasing, none the first. What such a layer does
                before the module of `eager` in it, where there is one, is still of the part before; it must change
                nothing but hidden states.

        Returns:
            What the forward returned: its tensors are those that each run writes anew.

        Raises:
            NotRecordable: with the reason.
        """
        slots = dict(zip(self._mixers, self._table.slots(), strict=True))
        recording.begin(slots)
        try:
            stand_ins = [(layers[cut], self._at_a_cut(layers[cut], cut, eager)) for cut in cuts]
            stand_ins += [(module, self._in_place_of(module)) for module in eager]
            with _forwards(stand_ins), self._capture.recording():
                forward()  # compiles kernels and sets up libraries, on scratch states
                self._capture.warmed_up()
                held = self._capture.reserved()
                self._begin()
                output = forward()
                self._end()
            if [step.layer for step in self._steps if isinstance(step, Point)] != list(cuts):
                raise NotRecordable("the layers do not run one after the other")
            self.bytes = max(0, self._capture.reserved() - held)
        finally:
            self._zeros = recording.end()
            self._table.recorded()
        return output

    def _begin(self) -> None:
        self._capturing = True
        self._capture.begin()

    def _end(self) -> None:
        self._capturing = False
        self._steps.append(self._capture.end())

    def _new_part(self) -> None:
        """Between two graphs: the part that the layer entered last begins with starts here."""
        if self._entered is not None:
            layer, hidden = self._entered
            part = 1 + sum(isinstance(step, Point) for step in self._steps)
            self._steps.append(Point(layer, part, hidden, self._returned))
            self._entered = None

    def _at_a_cut(self, layer: nn.Module, index: int, eager: list[nn.Module]) -> Callable[..., Any]:
        own = layer.forward
        has_eager = any(module in eager for module in layer.modules())

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not recording.under_way():
                return own(*args, **kwargs)  # another thread runs the model meanwhile
            if self._capturing:
                self._entered = index, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                if not has_eager:
                    self._end()
                    self._new_part()
                    self._begin()
            output = own(*args, **kwargs)
            self._returned = None if isinstance(output, Tensor) else len(output)
            return output

        return forward

    def _in_place_of(self, module: nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not recording.under_way():
                return own(*args, **kwargs)
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
            self._new_part()
            result = torch.empty_like(hidden)
            self._steps.append(_EagerCall(module, args, kept, result))
            self._begin()
            return result, None

        return forward

    def bind(self, states: list[tuple[Tensor, Tensor]]) -> None:
        """Use these states from the next run on."""
        self._table.bind(states)

    def run(self, make_fresh: Callable[[], dict[str, Any]], may_run: Callable[[int], bool]) -> Point | None:
        """Run the forward once. `make_fresh` gives a value for each of FRESH that an eager call takes.

        It is called where the first eager call needs it, while the GPU is busy with what comes before. So is `may_run`,
        before each part but the first.

        Returns:
            None, or the point before the first part that may not run: the layers before it have run, and none after.
        """
        self._table.start()
        fresh: dict[str, Any] = {}
        stopped = None
        for step in self._steps:
            if isinstance(step, Point):
                if not may_run(step.part):
                    stopped = step
                    break
            elif isinstance(step, _EagerCall):
                fresh = fresh or make_fresh()
                step(fresh)
            else:
                step()
        self._table.done()
        return stopped


def go_on(point: Point, forward: Callable[[], Any], layers: Sequence[nn.Module]) -> Any:
    """Run a model's own forward from a point on: the layers before it hand on what they have made already."""
    thread = threading.get_ident()
    made = point.hidden if point.returned is None else (point.hidden, *[None] * (point.returned - 1))

    def stand_in(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: made if threading.get_ident() == thread else own(*args, **kwargs)

    with _forwards([(layer, stand_in(layer.forward)) for layer in layers[: point.layer]]):
        return forward()


@contextmanager
def _forwards(stand_ins: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules other forwards for a while."""
    before = [(module.__dict__, module.__dict__.get("forward")) for module, _ in stand_ins]
    try:
        for module, forward in stand_ins:
            module.__dict__["forward"] = forward
        yield
    finally:
        for attributes, own in before:
            if own is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = own
