"""lm-evaluation-harness's own command line, with the model type `fastmamba` beside its own.

    python -m fastmamba.lm_eval run --model fastmamba --model_args pretrained=NAME,dtype=bfloat16 --tasks lambada_openai
    accelerate launch -m fastmamba.lm_eval run ...

`fastmamba` is lm-eval's `hf` on a patched model: it takes what `hf` takes, and the options of `fastmamba.patch` with
`patch_` before their names (patch_scope=mixer, patch_backend=torch). Nothing else of the package imports this module.
"""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch

from fastmamba.hf.patch import patch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("fastmamba.lm_eval needs lm-eval: pip install 'lm-eval>=0.4.13' accelerate") from error

_PREFIX = "patch_"
_logger = logging.getLogger(__name__)


@register_model("fastmamba")
class FastMambaLM(HFLM):
    """lm-eval's HFLM with `fastmamba.patch` applied to the model as soon as it is loaded.

    Args:
        pretrained: a hub name, a folder, or a loaded transformers model (which is patched in place).
        **kwargs: HFLM's own, and the options of `fastmamba.patch` with `patch_` before their names. Dtypes may be given
            by name, None as "none".

    Raises:
        ValueError: an unknown `patch_` option, or what `patch` raises.
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        self._patch_options = patch_options({name: kwargs.pop(name) for name in [*kwargs] if name.startswith(_PREFIX)})
        super().__init__(pretrained, **kwargs)
        if not isinstance(pretrained, str):
            self._patch()
        # HFLM splits the requests over processes only where there are several GPUs. Elsewhere each would answer all.
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self._world_size == 1 and not kwargs.get("parallelize"):
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        self._patch()

    def _patch(self) -> None:
        report = patch(self._model, **self._patch_options)
        _logger.info("%s", report)


def patch_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """`patch_`-arguments, as a command line gives them, as keyword arguments of `fastmamba.patch`.

    Raises:
        ValueError: an option that `patch` does not have, or a dtype that torch does not have.
    """
    allowed = [name for name, parameter in inspect.signature(patch).parameters.items() if parameter.kind.value == 3]
    options = {}
    for argument, value in arguments.items():
        name = argument.removeprefix(_PREFIX)
        if name not in allowed:
            known = ", ".join(_PREFIX + each for each in allowed)
            raise ValueError(f"{argument} is no option of fastmamba.patch: allowed are {known}")
        if isinstance(value, str) and value.lower() == "none":
            value = None
        elif name.endswith("dtype") and isinstance(value, str):
            dtype = getattr(torch, value.removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{argument} must be the name of a torch dtype or none, got {value!r}")
            value = dtype
        options[name] = value
    return options


def main() -> None:
    """Run lm-eval's command line. Without --model or --config it takes `fastmamba`, where lm-eval would take `hf`."""
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv[1:]
    named = any(a.split("=")[0] in ("--model", "-M", "--config", "-C", "-h", "--help") for a in arguments)
    if arguments and not named and arguments[0] not in ("ls", "validate"):
        sys.argv += ["--model", "fastmamba"]
    cli_evaluate()


if __name__ == "__main__":
    main()
