"""Calls whose launches are prepared: noted down while one call runs, then repeated with other tensors of the same form.

Most of what a launcher does at each call depends only on the form of its tensors (shapes, strides, dtypes, device):
which kernel, which grid, which numbers, views of which parts. What remains for the next call of a form is to allocate
and to put addresses where they belong. Neither tensors nor addresses of the call that was noted down are kept.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmamba.kernels import _launch
from fastmamba.kernels._launch import hooked
from fastmamba.memory import empty as _empty

_aten = torch.ops.aten
_ALLOCATIONS = (_aten.new_empty.default, _aten.empty.memory_format)
_VIEWS = (
    _aten.view.default,
    _aten.view.dtype,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.transpose.int,
    _aten.detach.default,
)

_MOST = 64
"""Encoded descriptors that a prepared call remembers for each of its own."""

_lock = threading.Lock()


class _Recorder(TorchDispatchMode):
    """Notes down where each tensor comes from, and what is launched on it. Any other operation spoils the record."""

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._held: list[Any] = [*tensors]  # so that no two tensors share an id
        # id of a tensor -> what its address is counted from, and the bytes between
        self.origins: dict[int, tuple[Any, int]] = {}
        self.buffers: list[Tensor] = []
        self.again: list[Callable[[], Tensor]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.spoilt = False
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                self.spoilt |= id(tensor) in self.origins  # given twice: which of the two is meant?
                self.origins[id(tensor)] = ("input", i), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._held.append(result)
        found = result if isinstance(result, (list, tuple)) else [result]
        if func in _ALLOCATIONS:
            self.origins[id(result)] = ("buffer", len(self.buffers)), 0
            self.buffers.append(result)
        elif func in _VIEWS and id(args[0]) in self.origins:
            origin, offset = self.origins[id(args[0])]
            for view in found:
                self.origins[id(view)] = origin, offset + view.data_ptr() - args[0].data_ptr()
        elif any([isinstance(tensor, Tensor) and id(tensor) not in self.origins for tensor in found]) or (
            func._schema.is_mutable
        ):
            self.spoilt = True
        return result

    def given(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        """A launch is about to take a tensor which the next call gets by calling `again`."""
        if self._thread == threading.get_ident():
            self._held.append(tensor)
            self.origins[id(tensor)] = ("again", len(self.again)), 0
            self.again.append(again)

    def launched(self, *launch: Any) -> None:
        """There was a launch; None for one that cannot be repeated."""
        if self._thread == threading.get_ident():
            self._held.append(launch)
            self.launches.append(launch)
            self.spoilt |= launch[0] is None

    def origin(self, tensor: Tensor) -> tuple[Any, int] | None:
        found = self.origins.get(id(tensor))
        self.spoilt |= found is None
        return found


def prepare(run: Callable[[], Any], tensors: tuple[Tensor | None, ...]) -> tuple[Any, Prepared | None]:
    """Call `run`, which works on `tensors` and depends on their form alone, and prepare the next call of this form.

    Returns:
        What `run` returns, a tensor or a tuple of tensors; and None where the call cannot be prepared.
    """
    if not _lock.acquire(blocking=False):
        return run(), None
    try:
        record = _launch.recorder = _Recorder(tensors)
        try:
            with record:
                result = run()
        finally:
            _launch.recorder = None
    finally:
        _lock.release()
    if record.spoilt or not record.launches:
        return result, None
    prepared = Prepared(record, tensors, result)
    return result, None if record.spoilt else prepared


class Prepared:
    """A call that is repeated by allocating, collecting addresses and launching."""

    __slots__ = (
        "_again", "_constants", "_current", "_derived", "_described", "_index", "_launches", "_outputs", "_residues",
        "_scratch", "_single", "_sizes", "_stream_of",
    )  # fmt: skip

    def __init__(self, record: _Recorder, tensors: tuple[Tensor | None, ...], result: Any) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        self._index = present[0].get_device()
        self._residues = [tensor.data_ptr() & 15 for tensor in present]
        self._single = isinstance(result, Tensor)
        # Everything is put side by side: None, the address of an empty tensor, the stream, addresses of the inputs, the
        # outputs, the scratch memory, those of `again`, those at a distance from one of these, what descriptors become,
        # and what is the same in every call. Each launch takes its arguments from there.
        places: dict[Any, int] = {None: 0, "empty": 1, "stream": 2}
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                places["input", i] = len(places)
        self._outputs: list[Any] = []
        """(shape, strides, dtype) of one to allocate, the number of an input, or an empty tensor."""
        for tensor in (result,) if self._single else result:
            origin, offset = record.origin(tensor) or (("none", 0), 0)
            if origin[0] == "input":
                same = tensors[origin[1]] is tensor
                self._outputs.append(origin[1])
            else:
                same = origin[0] == "buffer" and origin not in places and not offset and tensor.is_contiguous()
                same = same and tensor.nbytes == record.buffers[origin[1]].nbytes
                if tensor.numel():
                    places[origin] = len(places)
                    self._outputs.append((tuple(tensor.shape), tensor.stride(), tensor.dtype))
                else:
                    self._outputs.append(torch.empty_like(tensor))
            record.spoilt |= not same
        scratch: list[int] = []
        empty = set()
        size = 0
        for i, buffer in enumerate(record.buffers):
            if not buffer.numel():
                empty.add(("buffer", i))
            elif ("buffer", i) not in places:
                places["buffer", i] = len(places)
                scratch.append(size)
                size += -(-buffer.nbytes // 256) * 256
        self._scratch, self._sizes = scratch, ((size,), (1,), torch.uint8)
        self._again = record.again
        for i in range(len(record.again)):
            places["again", i] = len(places)

        self._derived: list[tuple[int, int]] = []
        self._described: list[tuple[int, dict[int, Any], Any]] = []
        count = len(places)
        places |= dict.fromkeys(empty, places["empty"])
        derived: dict[tuple[int, int], int] = {}
        picks: list[list[Any]] = []
        described: list[tuple[list[Any], int, int, Any, Any]] = []
        for found, _, arguments, _, _ in record.launches:
            pick: list[Any] = []
            number = 0
            for tensor in arguments:
                if tensor is None:
                    pick.append(0)
                    continue
                base = tensor if isinstance(tensor, Tensor) else tensor.base
                origin = record.origin(base)
                if origin is None or origin[0] not in places:
                    record.spoilt = True
                    return
                place = places[origin[0]]
                if origin[1]:
                    where = place, origin[1]
                    if where not in derived:
                        derived[where] = count
                        self._derived.append(where)
                        count += 1
                    place = derived[where]
                if base is tensor:
                    pick.append(place)
                else:
                    described.append((pick, len(pick), place, tensor, _encoder(found, number)))
                    pick.append(None)
                    number += 1
            picks.append(pick)
        for pick, at, place, descriptor, encode in described:
            if encode is None:
                record.spoilt = True
                return
            template = copy.copy(descriptor)
            template.base = None
            length = len(encode(descriptor))
            self._described.append((place, {}, _Encode(encode, template)))
            pick[at] = range(count, count + length)
            count += length
        self._constants: list[Any] = []
        self._launches: list[tuple[Any, ...]] = []

        def constant(values: Iterable[Any]) -> range:
            start = count + len(self._constants)
            self._constants += values
            return range(start, count + len(self._constants))

        for pick, (found, grid, _, numbers, constants) in zip(picks, record.launches, strict=True):
            flat = [at for part in pick for at in (part if isinstance(part, range) else (part,))]
            leading, rest = constant(found.leading), constant((*numbers, *constants))
            take = itemgetter(*constant(grid), places["stream"], *leading, *flat, *rest)
            self._launches.append((found.call, take, found))
        self._stream_of, self._current = found.stream_of, found.current

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> Any:
        """Repeat the call with these tensors, of the form of those before; None where it has to take the long way."""
        index = self._index
        if self._current() != index:
            with torch.cuda.device(index):
                return self(tensors)
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        if hooked() or [address & 15 for address in addresses] != self._residues:
            return None
        values: list[Any] = [None, 0, self._stream_of(index), *addresses]
        outputs: list[Any] = []
        for output in self._outputs:
            if type(output) is tuple:
                shape, strides, dtype = output
                made = _empty(shape, strides, dtype, index)
                values.append(made.data_ptr())
                outputs.append(made)
            else:
                outputs.append(tensors[output] if type(output) is int else output)
        if self._scratch:
            memory = _empty(*self._sizes, index)  # kept until all is launched
            start = memory.data_ptr()
            values += [start + offset for offset in self._scratch]
        held = [again() for again in self._again]
        for tensor in held:
            values.append(tensor.data_ptr())
        for place, offset in self._derived:
            values.append(values[place] + offset)
        for place, known, encode in self._described:
            address = values[place]
            argument = known.get(address)
            if argument is None:
                if len(known) >= _MOST:
                    known.clear()
                argument = known[address] = encode(address)
            values += argument
        values += self._constants
        for call, take, _ in self._launches:
            call(*take(values))
        return outputs[0] if self._single else tuple(outputs)


def _encoder(found: Any, number: int) -> Callable[[Any], list[Any]] | None:
    """How the `number`th descriptor that a kernel takes becomes arguments."""
    return None if found.encode is None else partial(found.encode, number)


class _Encode:
    """A descriptor at another address, as arguments."""

    def __init__(self, encode: Callable[[Any], list[Any]], template: Any) -> None:
        self._encode, self._template = encode, template

    def __call__(self, address: int) -> list[Any]:
        descriptor = copy.copy(self._template)
        descriptor.base = _At(address)
        return self._encode(descriptor)


class _At:
    """As much of a tensor as encoding a descriptor asks for."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address
