"""The one-token forward that is being recorded, if there is one, as the layers' own forwards see it."""

from __future__ import annotations

import threading
from typing import Any

lock = threading.Lock()
"""Held while there is a recording: one at a time in a process."""
_states: dict[Any, Any] | None = None
_thread: int | None = None


def begin(states: dict[Any, Any]) -> None:
    """From now on, mixers that this thread runs use these states, by mixer. The lock has to be held."""
    global _states, _thread
    _states, _thread = states, threading.get_ident()


def end() -> None:
    """There is no recording any more."""
    global _states, _thread
    _states = _thread = None


def state_for(mixer: Any, state: Any) -> Any:
    """The state that a mixer is to use: the recording's where this thread makes one, else the one given."""
    return _states[mixer] if _states is not None and under_way() else state


def under_way() -> bool:
    """Whether this thread is recording."""
    return _states is not None and _thread == threading.get_ident()
