"""What is measured against what: our variants, and every peer that can be imported."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmamba import configs
from fastmamba.ops import ssd
from fastmamba.testing import SsdCase

LIMIT = 2**31


@dataclass(frozen=True)
class Contender:
    """One implementation of the SSD."""

    name: str
    call: Callable[[SsdCase], tuple[Tensor, Tensor]]
    """y and the final states."""
    ours: bool = False
    prepare: Callable[[SsdCase], tuple[SsdCase | None, str]] = lambda case: (case, "")
    """The case as it takes it (None if it cannot), and a remark on what was changed, or why it cannot."""
    scope: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def contenders(device: torch.device, precisions: tuple[str, ...] = ("exact",)) -> list[Contender]:
    """Ours first."""
    found = [
        _ours(variant, precision, len(precisions) > 1)
        for precision in precisions
        for variant in configs.ssd_variants(device)
    ]
    return found + peers()


def _ours(variant: str, precision: str, name_it: bool) -> Contender:
    options: dict[str, Any] = {} if precision == "exact" else {"precision": precision}

    def call(case: SsdCase) -> tuple[Tensor, Tensor]:
        result: Any = ssd(*case.arguments(), **case.keywords(), **options, backend="triton")
        return result

    def prepare(case: SsdCase) -> tuple[SsdCase | None, str]:
        try:
            config(case, variant)
        except ValueError as error:
            return None, str(error)
        return case, ""

    name = f"{variant}, {precision}" if name_it else variant
    return Contender(name, call, ours=True, prepare=prepare, scope=lambda: configs.override(variant))


def config(case: SsdCase, variant: str | None = None) -> configs.SsdConfig:
    """The configuration that serves a case, in a given variant.

    Raises:
        ValueError: the variant does not cover the case.
    """
    batch, tokens, heads, head_dim = case.x.shape
    groups, state = case.B.shape[2:]
    size = (batch, tokens, heads, head_dim, state, case.chunk_size)
    with contextlib.nullcontext() if variant is None else configs.override(variant):
        return configs.ssd_config(case.x.device, case.x.dtype, *size, groups=groups)


def five_kernels() -> ModuleType | None:
    """mamba_ssm's module, where it is installed."""
    return _module("mamba_ssm.ops.triton.ssd_combined")


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def autotuners() -> list[Any]:
    """Those of mamba_ssm's kernels that have been imported."""
    from triton.runtime.autotuner import Autotuner

    found = []
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("mamba_ssm.ops.triton.") else ():
            while value is not None and not isinstance(value, Autotuner):
                value = getattr(value, "fn", None)  # other decorators wrap one
            if value is not None and value not in found:
                found.append(value)
    return found


def peers() -> list[Contender]:
    """mamba_ssm's five kernels as Transformers calls them, and, in a mamba_ssm that has it, the article's fused one."""
    module: Any = five_kernels()
    if module is None:
        return []

    def five(case: SsdCase) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, z, dt_bias, initial_states = case.arguments()
        rest: dict[str, Any] = dict(D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
        rest |= dict(dt_softplus=case.dt_softplus, dt_limit=case.dt_limit, return_final_states=True)
        return module.mamba_chunk_scan_combined(x, dt, A, B, C, 256, **rest)

    found = [Contender("mamba_ssm", five, prepare=_within_32_bits)]
    one: Any = _module("mamba_ssm.ops.triton.ssd_fused5")
    if one is None:
        return found

    def fused(case: SsdCase) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, _, dt_bias, initial_states = case.arguments()
        rest: dict[str, Any] = dict(initial_states=initial_states, dt_bias=dt_bias, dt_softplus=case.dt_softplus)
        y, _, _, final, *_ = one._fused5_ssd(x, dt, A, B, C, D, 128, dt_limit=case.dt_limit, **rest)
        return y, final

    return [*found, Contender("article", fused, prepare=_for_the_article)]


def _for_the_article(case: SsdCase) -> tuple[SsdCase | None, str]:
    """The fused kernel of "Accelerating Mamba2 with Kernel Fusion" keeps C.B in float16, beside operands of x."""
    if case.x.dtype != torch.float16:
        return None, "does not compile for other dtypes than float16"
    return _within_32_bits(case)


def _within_32_bits(case: SsdCase) -> tuple[SsdCase | None, str]:
    """mamba_ssm counts offsets in 32 bits and goes wrong or crashes beyond them: there it gets contiguous copies."""

    def reach(tensor: Tensor) -> int:
        return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))

    copies = {
        name: tensor.contiguous()
        for name in ("x", "dt", "B", "C", "z")
        if (tensor := getattr(case, name)) is not None and reach(tensor) >= LIMIT
    }
    if not copies:
        return case, ""
    if any(tensor.numel() >= LIMIT for tensor in (case.x, *copies.values())):
        return None, "its offsets are 32-bit"
    return dataclasses.replace(case, **copies), f"given contiguous {', '.join(copies)}: its offsets are 32-bit"
