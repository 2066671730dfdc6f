"""Registration with torch.library, so that torch.compile and torch.export see each op whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("fastmamba", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register `fastmamba::<schema>`.

    Args:
        schema: name, arguments and results; a mutated argument is declared as `Tensor(a!) name`.
        implementation: runs the op on any device (it dispatches on the tensors' device itself).
        fake: the same signature; returns empty tensors of the right shape, dtype and strides.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmamba::{name}", fake, lib=_LIBRARY)
