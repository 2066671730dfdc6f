"""The supported mixers, in one table. They are matched by module path and class name: nothing is imported for that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """How one model family's mixer differs from the common Mamba-2 mixer."""

    model: str
    """The package under transformers.models."""
    mixer: str
    """The mixer class."""
    in_scale: str | None = None
    """Attribute that multiplies the input of in_proj."""
    projection_scale: str | None = None
    """Attribute that multiplies the output of in_proj."""
    roots: tuple[str, ...] = ()
    """The classes whose one-token forward may come from a CUDA graph, a model with its head first."""
    attention: tuple[str, ...] = ()
    """The classes of layers that have a key-value cache: they stay out of the graphs."""
    cache: str = "past_key_values"
    """The argument of a root's forward that is the cache."""

    @property
    def module(self) -> str:
        """The module that defines the mixer class."""
        return f"transformers.models.{self.model}.modeling_{self.model}"


FAMILIES = (
    Family("mamba2", "Mamba2Mixer", roots=("Mamba2ForCausalLM", "Mamba2Model"), cache="cache_params"),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridMambaLayer",
        roots=("GraniteMoeHybridForCausalLM", "GraniteMoeHybridModel"),
        attention=("GraniteMoeHybridAttention",),
    ),
    Family("bamba", "BambaMixer", roots=("BambaForCausalLM", "BambaModel"), attention=("BambaAttention",)),
    Family(
        "nemotron_h",
        "NemotronHMamba2Mixer",
        roots=("NemotronHForCausalLM", "NemotronHModel"),
        attention=("NemotronHAttention",),
    ),
    Family("zamba2", "Zamba2MambaMixer"),
    Family(
        "falcon_h1",
        "FalconH1Mixer",
        in_scale="ssm_in_multiplier",
        projection_scale="mup_vector",
        roots=("FalconH1ForCausalLM", "FalconH1Model"),
        attention=("FalconH1Attention",),
    ),
)

_BY_CLASS = {(family.module, family.mixer): family for family in FAMILIES}
_ROOTS = {(family.module, root): family for family in FAMILIES for root in family.roots}
_MODULES = frozenset(family.module for family in FAMILIES)


def match(module: nn.Module) -> tuple[Family, type] | None:
    """Return the family of a mixer and the class that the table names (its own class or a base of it)."""
    for cls in type(module).__mro__:
        family = _BY_CLASS.get((cls.__module__, cls.__qualname__))
        if family is not None:
            return family, cls
    return None


def match_root(module: nn.Module) -> Family | None:
    """Return the family of a model whose one-token forward may come from a graph, if its forward is the class's own."""
    for cls in type(module).__mro__:
        family = _ROOTS.get((cls.__module__, cls.__qualname__))
        if family is not None:
            return family if type(module).forward is cls.__dict__.get("forward") else None
    return None


def belongs(module: nn.Module) -> bool:
    """Whether a module of any kind comes from a supported family, mixer or not."""
    return any(cls.__module__ in _MODULES for cls in type(module).__mro__)
