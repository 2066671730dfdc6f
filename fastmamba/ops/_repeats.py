"""Eager calls of an op on a GPU whose launches are prepared, because one of the same form came before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_MOST = 1024
"""Forms that an op remembers; past that it starts anew."""
_TRIES = 4
"""Calls of a form after which it is known that it cannot be prepared."""
_NEAR = 4
"""Forms of one kind of call that are tried before a call's form is written out."""

_PLAIN = frozenset((Tensor, Parameter, type(None)))


@functools.cache
def _prepare() -> Any:
    """Triton comes in with the first call that needs it."""
    from fastmamba.kernels._prepared import prepare

    return prepare


class Repeats:
    """What an op knows of the forms of its calls.

        found = _repeats.again(tensors, options)
        if found is not None:
            return found
        ...  # checks, and whatever else has to be found out
        return _repeats.run(tensors, options, implementation, *arguments)

    The first call of a form runs as if nothing were, the second is noted down, and further ones come back from `again`.
    `options` are all arguments that are no tensors, and `tensors` need not be tensors before the checks.
    """

    def __init__(self, also: Callable[[], Any] | None = None) -> None:
        """`also` tells what else a call depends on."""
        self._also = also
        # form -> what repeats it; before that how many calls there were
        self._known: dict[Any, Any] = {}
        # kind of call -> a guard for tensors and what repeats their form, of the last few forms that there were
        self._near: dict[Any, tuple[tuple[Callable[..., bool], Any], ...]] = {}

    def again(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
        """What a call like those before it returns, or None where it has to go the long way."""
        if torch.compiler.is_compiling():
            return None
        try:
            kind = (*map(type, tensors), *options, None if self._also is None else self._also())
            near = self._near.get(kind, ())
            if near:
                present = [t for t in tensors if t is not None]
                for guard, known in near:
                    if guard(*present):
                        return None if _needs_grad(tensors) else known(tensors)
            known = self._known.get(self._form(tensors, options)) if tensors[0].is_cuda else None
        except (AttributeError, TypeError, RuntimeError):  # no tensor, or nothing that can be hashed
            return None
        if known is None or type(known) is int or _needs_grad(tensors):
            return None
        guard = _guard(tensors)
        if guard is not None:
            self._near[kind] = ((guard, known), *near[: _NEAR - 1])
        return known(tensors)

    def run(self, tensors: tuple[Any, ...], options: tuple[Any, ...], run: Callable[..., Any], *arguments: Any) -> Any:
        """`run(*arguments)`, the long way, after the checks."""
        if not tensors[0].is_cuda or torch.version.hip or not _PLAIN.issuperset(map(type, tensors)):
            return run(*arguments)
        try:
            form = self._form(tensors, options)
            known = self._known.get(form, 0)
        except TypeError:
            return run(*arguments)
        if type(known) is not int or known >= _TRIES:
            return run(*arguments)
        if len(self._known) >= _MOST:
            self._known.clear()
            self._near.clear()
        self._known[form] = known + 1
        if known == 0:
            return run(*arguments)
        result, prepared = _prepare()(lambda: run(*arguments), tensors)
        if prepared is not None:
            self._known[form] = prepared
        return result

    def _form(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
        """All that a call depends on besides what is in its tensors."""
        return (
            *map(type, tensors),
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors],
            *options,
            None if self._also is None else self._also(),
        )


def _guard(tensors: tuple[Any, ...]) -> Callable[..., bool] | None:
    """What tells whether tensors are of the form of these; None where torch does not have it, or it refuses even these.

    It compares types, shapes, strides, dtypes and devices in a quarter of the time that it takes to write them out. It
    refuses a tensor that is given twice.
    """
    present = [t for t in tensors if t is not None]
    sizes, strides = [list(t.shape) for t in present], [list(t.stride()) for t in present]
    try:  # a private class, which another torch may lack or build otherwise
        guards: Any = torch._C._dynamo.guards.TensorGuards
        guard = guards(*present, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return guard if guard(*present) else None
    except (AttributeError, TypeError, RuntimeError):
        return None


def _needs_grad(tensors: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
