"""The kernel that PyTorch's attention takes for one token."""

from __future__ import annotations

from typing import Any

from torch.backends import cuda


class without_cudnn:
    """A context in which `scaled_dot_product_attention` leaves cuDNN out, where torch has a fused kernel of its own.

    On Hopper and Blackwell PyTorch asks cuDNN first, which plans anew for each length of the keys: tens of milliseconds
    of host time for every token that is generated. The switches are the process's own: of several threads the one that
    turned cuDNN off turns it on again.
    """

    __slots__ = ("_off",)

    def __enter__(self) -> None:
        self._off = cuda.cudnn_sdp_enabled() and (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled())
        if self._off:
            cuda.enable_cudnn_sdp(False)

    def __exit__(self, *error: Any) -> None:
        if self._off:
            cuda.enable_cudnn_sdp(True)
