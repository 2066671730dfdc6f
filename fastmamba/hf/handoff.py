"""Carrying a layer's first norm over from the layer before, so that it is one pass with the residual add there.

The layer before returns the true hidden states, as ever, and leaves their norm here. The next layer takes it only if
it is given that very tensor, unchanged: what a hook does in between can lose the saving, never the answer.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor, nn

# Address of a tensor object -> (the object, its version, the norm, the norm's result). An entry goes with its tensor.
_left: dict[int, tuple[Any, int, nn.Module, Tensor]] = {}


def leave(hidden_states: Tensor, norm: nn.Module, normed: Tensor) -> None:
    """Leave norm(hidden_states) for whoever is about to ask for it.

    Tensors made in inference mode are not watched for changes, and nothing is left for them.
    """
    if hidden_states.is_inference():
        return
    key = id(hidden_states)
    _left[key] = (ref(hidden_states, lambda _: _left.pop(key, None)), hidden_states._version, norm, normed)


def take(hidden_states: Tensor, norm: nn.Module) -> Tensor | None:
    """What was left for these hidden states and this norm, if it still holds. It is given out once."""
    if not _left:
        return None
    found = _left.pop(id(hidden_states), None)
    if found is None or found[0]() is not hidden_states or found[2] is not norm:
        return None
    return found[3] if hidden_states._version == found[1] else None
