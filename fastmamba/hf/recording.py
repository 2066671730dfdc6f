"""The one-token forward that is being recorded, if there is one, as the layers' own forwards see it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

lock = threading.Lock()
"""Held while there is a recording: one at a time in a process."""
_states: dict[Any, Any] | None = None
_thread: int | None = None
_zeros: Tensor | None = None


def begin(states: dict[Any, Any]) -> None:
    """From now on, mixers that this thread runs use these states, by mixer. The lock has to be held."""
    global _states, _thread, _zeros
    _states, _thread, _zeros = states, threading.get_ident(), None


def end() -> Tensor | None:
    """There is no recording any more. Returns what `zeros` gave, which has to be kept as long as what was recorded."""
    global _states, _thread, _zeros
    found, _states, _thread, _zeros = _zeros, None, None, None
    return found


def state_for(mixer: Any, state: Any) -> Any:
    """The state that a mixer is to use: the recording's where this thread makes one, else the one given."""
    return _states[mixer] if _states is not None and under_way() else state


def under_way() -> bool:
    """Whether this thread is recording."""
    return _states is not None and _thread == threading.get_ident()


def zeros(count: int, device: torch.device) -> Tensor | None:
    """Zeros for kernels of a recording that leave them zero, the same for all, who run one after the other.

    They are made before anything is captured: a graph would fill its own at every replay. None without a recording.
    """
    global _zeros
    if not under_way():
        return None
    if _zeros is None:
        _zeros = torch.zeros(count, dtype=torch.int32, device=device)
    return _zeros
