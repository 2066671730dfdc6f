"""What every launcher shares.

`kernel[grid](...)` costs 18 to 25 us of host time, most of it spent on finding again the compiled kernel that the last
call found. `Launcher` remembers it and calls it directly.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

_runtime = triton.knobs.runtime

recorder: Any = None
"""Who is told of every launch, while `fastmamba.kernels._prepared` notes a call down."""

_MOST = 4096
"""Remembered specialisations of one kernel; past that a launcher starts anew."""


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's GPU current while a kernel is launched: Triton launches on the current one."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last axis is contiguous (every view of a projection), else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class Ready(NamedTuple):
    """A compiled kernel and how to launch it."""

    call: Callable[..., Any]
    leading: tuple[Any, ...]
    """What `call` takes between stream and arguments."""
    expand: Callable[[tuple[Any, ...]], list[Any]]
    """Makes arguments of tensors and descriptors."""
    encode: Callable[[int, Any], list[Any]] | None
    """Makes arguments of one descriptor, the how manieth it is given; None where Triton's own call does."""
    stream_of: Callable[[int], int]
    current: Callable[[], int]
    held: Any


class Launcher:
    """Launches a `triton.jit` (or Gluon) kernel whose parameters are tensors first, then numbers, then constexprs.

        launch = Launcher(kernel)
        launch(grid, (x, None, y), (tokens, x.stride(0)), (BLOCK, SILU), num_warps=4)

    The first call with a given specialisation is Triton's own `kernel[grid](...)`, which compiles. Later ones go
    straight to the compiled kernel. They are told apart by all that Triton specialises on, or by more: device, options,
    constexprs, the numbers themselves, and each tensor's dtype and whether its address is a multiple of 16.

    Triton's own call serves every time in the interpreter, on GPUs other than NVIDIA's (AMD's backend specialises also
    on the size of a tensor's storage), and while a launch hook is installed (Triton's profiler does). Triton's debug
    knobs are looked at only when a specialisation is new.
    """

    __slots__ = ("_described", "_kernel", "_ready")

    def __init__(self, kernel: Any, described: bool = False) -> None:
        """With `described`, some of the tensors are host-side tensor descriptors."""
        self._kernel, self._described = kernel, described
        self._ready: dict[Any, Ready] | None = {} if isinstance(kernel, JITFunction) else None

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        numbers: tuple[int | float | bool, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Launch on the current stream of the first tensor's GPU.

        Args:
            grid: blocks along x, y and z.
            tensors: for each pointer parameter a tensor or None, or a host-side tensor descriptor; the first a tensor.
            numbers: for each further run-time parameter. One that is a float is a float in every call.
            constants: for each constexpr, hashable.
            options: num_warps, num_stages and what else Triton takes, in the same order in every call.
        """
        ready, noted = self._ready, recorder
        index = tensors[0].get_device()
        if ready is None or index < 0:
            if noted is not None:
                noted.launched(None)
            self._kernel[grid](*tensors, *numbers, *constants, **options)
            return
        if self._described:
            kinds: Any = tuple([_kind(tensor) for tensor in tensors])
            arguments = tensors
            low = 0
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    low |= tensor.data_ptr()
        else:
            kinds = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
            arguments = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            low = 0
            for address in arguments:
                if address is not None:
                    low |= address
        if low & 15:  # some address is not a multiple of 16: which ones?
            kinds = kinds, tuple([isinstance(tensor, Tensor) and tensor.data_ptr() & 15 != 0 for tensor in tensors])
        key = (index, numbers, constants, kinds, *options.items())
        found = ready.get(key)
        if found is None or hooked():
            if noted is not None:
                noted.launched(None)
            with on_device(tensors[0]):
                compiled = self._kernel[grid](*tensors, *numbers, *constants, **options)
            if found is None:
                self._remember(key, compiled, tensors)
            return
        if noted is not None:
            noted.launched(found, grid, tensors, numbers, constants)
        call, leading, expand, _, stream_of, current, _ = found
        if self._described:
            arguments = expand(tensors)
        if current() == index:
            call(*grid, stream_of(index), *leading, *arguments, *numbers, *constants)
            return
        with torch.cuda.device(index):
            call(*grid, stream_of(index), *leading, *arguments, *numbers, *constants)

    def _remember(self, key: Any, compiled: Any, tensors: tuple[Any, ...]) -> None:
        driver: Any = triton.runtime.driver.active
        if driver.get_current_target().backend != "cuda":
            self._ready = None
            return
        if not hasattr(compiled, "packed_metadata"):  # still compiling, in Triton's asynchronous mode
            return
        if self._ready is None or len(self._ready) >= _MOST:
            self._ready = {}
        call, leading, expand, encode = _shortcut(compiled)
        # The compiled kernel itself is held too: Triton unloads one that nothing refers to. And the layouts of
        # descriptors, which `_kind` knows by identity.
        held = compiled, [getattr(tensor, "layout", None) for tensor in tensors]
        current = torch._C._cuda_getDevice
        self._ready[key] = Ready(call, leading, expand, encode, driver.get_current_stream, current, held)


def _kind(tensor: Any) -> Any:
    """What Triton specialises on in an argument that is None, a tensor, or a host-side tensor descriptor."""
    if tensor is None:
        return None
    if isinstance(tensor, Tensor):
        return tensor.dtype
    return tensor.base.dtype, *tensor.block_shape, id(tensor.layout) if hasattr(tensor, "layout") else 0


def _addresses(tensors: tuple[Any, ...]) -> list[Any]:
    return [tensor.data_ptr() if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def _shortcut(compiled: Any) -> tuple[Any, tuple[Any, ...], Any, Any]:
    """How to launch a compiled kernel: the first four of `Ready`.

    Triton's `compiled.run` asks at every launch what never changes for a kernel, and encodes each descriptor anew,
    though allocators hand out the same addresses over and over. In Triton 3.6 what lies beneath is called instead.
    """
    run = compiled.run
    usual = run, (compiled.function, compiled.packed_metadata, None, None, None), _addresses, None
    if not triton.__version__.startswith("3.6.") or type(run).__name__ != "CudaLauncher":
        return usual
    if run.global_scratch_size or run.profile_scratch_size:
        return usual
    leading = (
        compiled.function,
        run.launch_cooperative_grid,
        run.launch_pdl,
        None,
        None,
        compiled.packed_metadata,
        None,
        None,
        None,
    )
    launch = run.launch
    if not isinstance(launch, types.FunctionType):
        return launch, leading, _addresses, None
    within = inspect.getclosurevars(launch).nonlocals
    metas, inner = within.get("tensordesc_meta"), within.get("launcher")
    if inner is None or not metas or None in metas:
        return usual
    from triton.backends.nvidia import driver

    encode: Any = driver.make_tensordesc_arg
    encoded: dict[Any, list[Any]] = {}

    def expand(tensors: tuple[Any, ...]) -> list[Any]:
        arguments: list[Any] = []
        count = 0
        for tensor in tensors:
            if tensor is None:
                arguments.append(None)
            elif isinstance(tensor, Tensor):
                arguments.append(tensor.data_ptr())
            else:
                key = (count, tensor.base.data_ptr(), *tensor.shape, *tensor.strides)
                known = encoded.get(key)
                if known is None:
                    if len(encoded) >= _MOST:
                        encoded.clear()
                    known = encoded[key] = encode(tensor, metas[count])
                arguments += known
                count += 1
        return arguments

    return inner, leading, expand, lambda number, descriptor: encode(descriptor, metas[number])


def hooked() -> bool:
    """Whether a launch hook is installed: a chain of them, or (in Triton's older style) one function or None."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))
