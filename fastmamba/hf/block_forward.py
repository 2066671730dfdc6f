"""The forwards of what surrounds the mixers: norms, residual adds, experts, the gate of the multilayer perceptron.

Each does what the class's own forward does, in the same order and with the same roundings, calling the same modules; a
norm or activation that has a hook is called as the module it is. All are named forward, because that is how a bound
method is pickled: as getattr(module, "forward"), the class's own forward when loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from fastmamba.hf.block_step import can_feed, feed_forward, step
from fastmamba.hf.experts import mix, serves, why_not
from fastmamba.hf.handoff import leave, take
from fastmamba.hf.report import GRADIENTS, count_original
from fastmamba.modules import call, call_linear, child, is_watched, parameter
from fastmamba.ops import add_rms_norm, rms_norm, silu_and_mul

following: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], bool]] = WeakKeyDictionary()
"""Layer -> the norm that its output is about to meet, and whether that rounds to the dtype of its weight.

Beside the modules and not on them: a deepcopy or pickle carries no guess, and takes each norm in a pass of its own.
"""

TENSOR = "hidden_states is not an ordinary tensor of shape (B, T, hidden size)"
DTYPE = "hidden_states of a dtype without a kernel"
META = "hidden_states on the meta device"
TRAINING = "training mode"
PACKED = "packed sequences (seq_idx, cu_seqlens)"
ELSEWHERE = "weight on another device, or of another kind"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _unsupported(module: Any, hidden_states: Any) -> str | None:
    """Why a call has to run the original forward, or None. This runs at every call: cheap checks only."""
    if module.training:
        return TRAINING
    if type(hidden_states) is not Tensor or hidden_states.ndim != 3 or 0 in hidden_states.shape:
        return TENSOR
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(p.requires_grad for p in module.parameters())):
        return GRADIENTS
    dtype = hidden_states.dtype
    if dtype not in _DTYPES and not (dtype is torch.float64 and hidden_states.is_cpu):
        return DTYPE
    return META if hidden_states.is_meta else None


def _original(module: Any, reason: str, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        count_original(module, reason)
    return type(module).forward(module, *args, **kwargs)


def _plain(norm: Any, device: torch.device) -> bool:
    """Whether a norm can be fused: its forward is ours, nobody watches it, and its weight is here."""
    if is_watched(norm):
        return False
    forward = norm.__dict__.get("forward")
    return getattr(forward, "__code__", None) is _NORM and parameter(norm, "weight").device == device


def _one_token(hidden_states: Tensor) -> bool:
    """Whether the step of a whole layer may serve; not in torch.compile, which cannot trace how it finds its plan."""
    return hidden_states.shape[1] == 1 and not torch.compiler.is_compiling()


def _first_norm(norm: Any, hidden_states: Tensor, dtype: torch.dtype | None, backend: str) -> Tensor:
    """The norm that a layer starts with. Its own forward has been bound too, by the same `patch`."""
    if not _plain(norm, hidden_states.device):
        return norm(hidden_states if dtype is None else hidden_states.to(dtype))
    normed = take(hidden_states, norm)
    if normed is None:
        normed = rms_norm(
            hidden_states, parameter(norm, "weight"), eps=norm.variance_epsilon, dtype=dtype, backend=backend
        )
    return normed


def _finish(
    layer: Any, x: Tensor, residual: Tensor, factor: float, sum_dtype: torch.dtype | None, backend: str
) -> Tensor:
    """The residual add that a layer ends with, together with the norm that follows where that is known."""
    # torch.compile would guard on a weak dictionary entry by entry, and fail when one dies meanwhile.
    guess = None if torch.compiler.is_compiling() else following.get(layer)
    norm: Any = None if guess is None else guess[0]()
    if (
        guess is None
        or norm is None
        or type(x) is not Tensor
        or torch.is_grad_enabled()
        or x.device != residual.device
        or not _plain(norm, x.device)
    ):
        residual = residual if sum_dtype is None else residual.to(sum_dtype)
        return residual + (x if factor == 1.0 else x * factor)
    weight = parameter(norm, "weight")
    normed, total = add_rms_norm(
        x,
        residual,
        weight,
        eps=norm.variance_epsilon,
        factor=factor,
        sum_dtype=sum_dtype,
        dtype=weight.dtype if guess[1] else None,
        backend=backend,
    )
    leave(total, norm, normed)
    return total


def norm_forward(backend: str) -> Callable[..., Tensor]:
    """For an RMSNorm."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        reason = _unsupported(self, hidden_states)
        weight = parameter(self, "weight")
        if reason is None and (weight.device != hidden_states.device or not weight.is_floating_point()):
            reason = ELSEWHERE
        if reason is not None:
            return _original(self, reason, hidden_states)
        normed = take(hidden_states, self)
        if normed is None:
            normed = rms_norm(hidden_states, weight, eps=self.variance_epsilon, backend=backend)
        return normed

    return forward


_NORM = norm_forward("auto").__code__
"""By which a norm's forward is known for ours, whatever its backend."""


def mlp_forward(backend: str) -> Callable[..., Tensor]:
    """For a GraniteMoeHybridMLP."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if (
            self.training
            or torch.is_grad_enabled()
            or type(hidden_states) is not Tensor
            or is_watched(child(self, "activation"))
        ):
            return type(self).forward(self, hidden_states)  # nothing is lost but a pass over memory
        projected = call_linear(child(self, "input_linear"), hidden_states)
        output_linear = child(self, "output_linear")
        if type(projected) is not Tensor or projected.ndim != 3 or 0 in projected.shape:
            gate, up = projected.chunk(2, dim=-1)
            return output_linear(self.activation(gate) * up)
        return call_linear(output_linear, silu_and_mul(projected, backend=backend))

    return forward


def moe_forward(backend: str) -> Callable[..., Tensor]:
    """For a GraniteMoeHybridMoE."""

    def forward(self: Any, layer_input: Tensor) -> Tensor:
        if not _mixes(self, layer_input, backend):
            return type(self).forward(self, layer_input)
        return mix(self, layer_input, None, backend)

    return forward


_MOE = moe_forward("auto").__code__
"""By which a mixture's forward is known for ours, whatever its backend."""


def _mixes(mixture: Any, x: Any, backend: str) -> bool:
    """Whether a mixture of experts is computed by kernels of ours; where it might be and is not, that is counted."""
    if mixture.training or type(x) is not Tensor or x.ndim != 3 or 0 in x.shape or x.is_meta:
        return False
    if torch.is_grad_enabled() and x.requires_grad or not serves(backend, x):
        return False
    reason = why_not(mixture, x)
    if reason is not None and not torch.compiler.is_compiling():
        count_original(mixture, reason)
    return reason is None


def _mixture(mixture: Any, x: Tensor, mlp: Any, backend: str) -> Tensor:
    """mixture(x) + mlp(x), the sum in the same pass where nobody hears of which was called first."""
    forward = mixture.__dict__.get("forward")
    if getattr(forward, "__code__", None) is not _MOE or is_watched(mixture) or is_watched(mlp):
        return mixture(x) + call(mlp, x)
    if not _mixes(mixture, x, backend):
        return type(mixture).forward(mixture, x) + call(mlp, x)
    add = call(mlp, x)
    if type(add) is Tensor and add.shape == x.shape and add.dtype == x.dtype and add.device == x.device:
        return mix(mixture, x, add, backend)
    return mix(mixture, x, None, backend) + add


def mamba2_block_forward(backend: str) -> Callable[..., Tensor]:
    """For a Mamba2Block: h + mixer(norm(h)), h in float32 where the block's residual_in_fp32 says so."""

    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        norm = child(self, "norm")
        reason = _unsupported(self, hidden_states)
        if reason is None and kwargs and (kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None):
            reason = PACKED  # some versions hand these on to the mixer, some do not
        if reason is not None:
            return _original(
                self, reason, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
        sum_dtype = torch.float32 if self.residual_in_fp32 else None
        if _one_token(hidden_states) and _plain(norm, hidden_states.device):
            total = step(self.mixer, norm, hidden_states, cache_params, attention_mask, 1.0, sum_dtype)
            if total is not None:
                return total
        normed = _first_norm(norm, hidden_states, parameter(norm, "weight").dtype, backend)
        x = call(child(self, "mixer"), normed, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        del normed
        return _finish(self, x, hidden_states, 1.0, sum_dtype, backend)

    return forward


def granite_layer_forward(backend: str) -> Callable[..., Tensor]:
    """For a GraniteMoeHybridDecoderLayer: a mixer or attention, then experts, each h + multiplier branch(norm(h))."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        norm = child(self, "input_layernorm")
        reason = _unsupported(self, hidden_states)
        if reason is not None:
            kwargs |= {"use_cache": use_cache, "position_embeddings": position_embeddings}
            return _original(
                self, reason, hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        factor = self.residual_multiplier
        one = _one_token(hidden_states)
        after = child(self, "post_attention_layernorm")
        mamba = self._modules.get("mamba")
        feeds = one and _plain(after, hidden_states.device) and can_feed(self, hidden_states, backend)
        total = None
        if mamba is not None and one and _plain(norm, hidden_states.device):
            total = step(mamba, norm, hidden_states, past_key_values, attention_mask, factor, None)
        x = None
        if total is None:
            normed = _first_norm(norm, hidden_states, None, backend)
            if mamba is not None:
                x = call(
                    mamba, hidden_states=normed, cache_params=past_key_values, attention_mask=attention_mask, **kwargs
                )
            else:
                x, _ = self.self_attn(
                    hidden_states=normed,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    position_embeddings=position_embeddings,
                    **kwargs,
                )
            del normed
        if feeds:
            return feed_forward(self, after, hidden_states + x * factor if total is None else total, factor, backend)
        if total is not None:
            hidden_states, normed = total, after(total)
        elif type(x) is Tensor and x.device == hidden_states.device and _plain(after, x.device):
            normed, hidden_states = add_rms_norm(
                x, hidden_states, parameter(after, "weight"), eps=after.variance_epsilon, factor=factor, backend=backend
            )
        else:
            hidden_states = hidden_states + x * factor
            normed = after(hidden_states)
        del x
        if self.has_experts:
            x = _mixture(child(self, "block_sparse_moe"), normed, child(self, "shared_mlp"), backend)
        else:
            x = call(child(self, "shared_mlp"), normed)
        del normed
        return _finish(self, x, hidden_states, factor, None, backend)

    return forward
