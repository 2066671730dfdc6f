"""fastmamba: one line makes a loaded Hugging Face Mamba-2 model fast.

    import fastmamba
    fastmamba.patch(model)

Nothing heavy is imported here: torch and transformers come in with the first use of a name below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmamba.hf.patch import patch, patched, report, unpatch
    from fastmamba.hf.report import FastMambaWarning, GraphReport, LayerReport, Report

__version__ = "0.1.0"

_HOMES = {
    "patch": "fastmamba.hf.patch",
    "patched": "fastmamba.hf.patch",
    "report": "fastmamba.hf.patch",
    "unpatch": "fastmamba.hf.patch",
    "FastMambaWarning": "fastmamba.hf.report",
    "GraphReport": "fastmamba.hf.report",
    "LayerReport": "fastmamba.hf.report",
    "Report": "fastmamba.hf.report",
}

__all__ = [
    "FastMambaWarning",
    "GraphReport",
    "LayerReport",
    "Report",
    "__version__",
    "patch",
    "patched",
    "report",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
