"""What every launcher shares.

`kernel[grid](...)` costs 18 to 25 us of host time, most of it spent on finding again the compiled kernel that the last
call found. `Launcher` remembers it and calls it directly.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

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

    __slots__ = ("_kernel", "_ready")

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._ready: dict[Any, tuple[Any, ...]] | None = {} if isinstance(kernel, JITFunction) else None

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
        ready = self._ready
        index = tensors[0].get_device()
        if ready is None or index < 0:
            self._kernel[grid](*tensors, *numbers, *constants, **options)
            return
        addresses: list[Any] = []
        kinds: list[Any] = []
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
                kinds.append(None)
            elif isinstance(tensor, Tensor):
                address = tensor.data_ptr()
                addresses.append(address)
                kinds.append((tensor.dtype,) if address & 15 else tensor.dtype)
            else:
                addresses.append(tensor)
                kinds.append(_descriptor_kind(tensor))
        key = (index, numbers, constants, *kinds, *options.items())
        found = ready.get(key)
        if found is None or _hooked():
            with on_device(tensors[0]):
                compiled = self._kernel[grid](*tensors, *numbers, *constants, **options)
            if found is None:
                self._remember(key, compiled)
            return
        run, function, metadata, stream_of, current, _ = found
        if current() == index:
            run(*grid, stream_of(index), function, metadata, None, None, None, *addresses, *numbers, *constants)
            return
        with torch.cuda.device(index):
            run(*grid, stream_of(index), function, metadata, None, None, None, *addresses, *numbers, *constants)

    def _remember(self, key: Any, compiled: Any) -> None:
        driver: Any = triton.runtime.driver.active
        if driver.get_current_target().backend != "cuda":
            self._ready = None
            return
        if not hasattr(compiled, "packed_metadata"):  # still compiling, in Triton's asynchronous mode
            return
        if self._ready is None or len(self._ready) >= _MOST:
            self._ready = {}
        # The compiled kernel itself is held too: Triton unloads one that nothing refers to.
        self._ready[key] = (
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            driver.get_current_stream,
            torch._C._cuda_getDevice,
            compiled,
        )


def _descriptor_kind(descriptor: Any) -> tuple[Any, ...]:
    """What Triton specialises on in a host-side tensor descriptor."""
    return (
        type(descriptor),
        descriptor.base.dtype,
        len(descriptor.shape),
        tuple(descriptor.block_shape),
        getattr(descriptor, "layout", None),
    )


def _hooked() -> bool:
    """Whether a launch hook is installed: a chain of them, or (in Triton's older style) one function or None."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))
