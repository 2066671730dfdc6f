"""One-token calls of a whole model from CUDA graphs, recorded on first use and replayed from then on.

`patch` binds a forward on the model itself. A call of one token that continues a cache replays a `Tape`; every other
call runs the model's own forward. Whatever a tape depends on is looked at again at each call: the batch size, where the
cache's states are, where the weights are, modules that were exchanged, hooks.
"""

from __future__ import annotations

import functools
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from fastmamba.hf import recording
from fastmamba.hf.compat import cache_layer, captures
from fastmamba.hf.families import Family, match
from fastmamba.hf.guards import Bound, Config, Structure, states_of
from fastmamba.hf.pieces import in_pieces
from fastmamba.hf.report import GraphReport
from fastmamba.hf.sdpa import without_cudnn
from fastmamba.hf.tape import CudaCapture, NotRecordable, Point, Tape, go_on

MOST_TAPES = 16
"""Recorded forwards a model keeps; the one not used for longest goes first."""
MOST_BYTES = 4 << 30
"""Memory that a model's graphs may take."""

# Arguments of a model's forward that leave a one-token call what it is, and the values for which they do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "inputs_embeds": (None,),
    "labels": (None,),
    "return_dict": (None, True),
    "output_hidden_states": (None, False),
    "output_attentions": (None, False),
    "output_router_logits": (None, False),
    "token_type_ids": (None,),
}
_CHANGED = "the model has changed"
_BUSY = "another model is being recorded"


class _Ready(NamedTuple):
    """What served the last token: most often the next one, too."""

    tape: Tape
    ids: Tensor
    output: Any
    bound: Bound
    experts: Any


class Session:
    """The tapes of one model."""

    capture: Callable[[torch.device], Any] = CudaCapture
    """How to capture; tests put in a stand-in that needs no GPU."""
    device_type = "cuda"

    def __init__(self, root: nn.Module, family: Family) -> None:
        self._root, self._family = ref(root), family
        self._lock = threading.Lock()
        self._structure: Structure | None = None
        self._config: Config | None = None
        self._fault = ""  # why this structure cannot be recorded
        self._tapes: OrderedDict[Any, tuple[Tape, Tensor, Any]] = OrderedDict()
        self._bound: dict[Any, Bound] = {}
        self._last: _Ready | None = None
        self._refused: dict[Any, str] = {}
        self._capture: Any = None
        self._stream: Any = None
        self._raw_stream: int | None = None
        self.replays = 0
        self.eager: Counter[str] = Counter()
        self._name = type(root).__name__
        self._attention: list[nn.Module] = []
        self._mixers: list[Any] = []
        self._indices: list[int] = []

    def report(self) -> GraphReport:
        size = sum(tape.bytes for tape, _, _ in self._tapes.values())
        return GraphReport(self._name, len(self._tapes), size, self.replays, dict(self.eager))

    def clear(self) -> None:
        """Let go of the tapes and their memory."""
        if self._tapes and self.device_type == "cuda":
            torch.cuda.synchronize(self._capture.device)  # the last run may not be over
        self._tapes.clear()
        self._bound.clear()
        self._refused.clear()
        self._structure = self._capture = self._last = None

    def step(self, ids: Tensor, cache: Any, arguments: dict[str, Any]) -> Any:
        """Run a one-token call from a tape. Returns None where the model's own forward has to serve."""
        if not self._lock.acquire(blocking=False):
            self.eager["another thread is in a call"] += 1
            return None
        try:
            found = self._step(ids, cache, arguments)
        finally:
            self._lock.release()
        if isinstance(found, str):
            if found:
                self.eager[found] += 1
            return None
        return found

    def _step(self, ids: Tensor, cache: Any, arguments: dict[str, Any]) -> Any:
        root: Any = self._root()
        reason = self._why_not_now(root, ids, arguments)
        if reason:
            return reason
        if self._structure is None or not self._structure.holds(0):
            self._look_again(root)
        structure = self._structure
        assert structure is not None
        if self._fault:
            return self._fault

        layers, last = cache.layers, self._last
        if (
            last is None
            or last.bound.cache() is not cache
            or last.ids.shape != ids.shape
            or last.experts != self._experts()
            or not last.bound.holds(layers, 0)
        ):
            found = self._find(root, ids, cache)
            if isinstance(found, str):
                return found
            last = self._last = found
        fault = self._why_not_fresh(root, arguments)
        if fault:
            return fault
        self._wait(ids)
        last.ids.copy_(ids)
        fresh: dict[str, Any] = {}

        def make_fresh() -> dict[str, Any]:
            return fresh or self._fresh(root, ids, cache, arguments, fresh)

        bound, output = last.bound, last.output
        stopped = last.tape.run(make_fresh, lambda part: structure.holds(part) and bound.holds(layers, part))
        if stopped is not None:
            return self._go_on(root, stopped, ids, cache, make_fresh if self._attention else dict)
        self.replays += 1
        return type(output)(
            **{name: value.clone() if isinstance(value, Tensor) else cache for name, value in output.items()}
        )

    def _experts(self) -> Any:
        """How experts are computed."""
        assert self._config is not None
        experts = self._config.experts
        return tuple(experts.items()) if isinstance(experts, dict) else experts

    def _find(self, root: Any, ids: Tensor, cache: Any) -> _Ready | str:
        """The tape for a cache, set to it; or why there is none."""
        structure = self._structure
        assert structure is not None
        layers, first = cache.layers, self._indices[0]
        states = states_of(layers, [first])
        if isinstance(states, str):
            return states
        conv, ssm = states[first]  # all states are of one form, or `_look_at` refuses them
        key = (ids.shape[0], ssm.dtype, conv.dtype, ssm.shape, ssm.stride(), conv.stride(), self._experts())
        recorded = self._tapes.get(key)
        if recorded is None and not structure.holds_all():  # what is recorded now has to be what is looked at later
            self.clear()
            return _CHANGED
        if key in self._refused:
            return self._refused[key]
        bound = self._bound.get(key)
        if recorded is None or bound is None or bound.cache() is not cache or not bound.holds(layers, 0):
            found = self._set_to(root, key, ids, cache)
            if isinstance(found, str):
                return found
            bound, recorded = found, self._tapes[key]
        self._tapes.move_to_end(key)
        return _Ready(*recorded, bound, self._experts())

    def _look_again(self, root: Any) -> None:
        self.clear()
        self._fault = self._survey(root)
        if self._fault:  # every change may remove what stands against recording: all is looked at, at every call
            self._structure = Structure(root, [], [])
        else:
            self._structure = Structure(root, self._mixers, self._attention)

    def _set_to(self, root: Any, key: Any, ids: Tensor, cache: Any) -> Bound | str:
        """Set a tape to a cache, or make one for it; or say why not."""
        states = states_of(cache.layers, self._indices)
        if isinstance(states, str):
            return states
        pairs = list(states.values())
        fault = self._look_at(cache, [conv for conv, _ in pairs], [ssm for _, ssm in pairs], ids)
        if fault:
            return fault
        if key not in self._tapes:
            fault = self._record(root, key, ids, cache, pairs)
            if fault:
                if fault != _BUSY:
                    self._refused[key] = fault
                return fault
        self._wait(ids)
        self._tapes[key][0].bind(pairs)
        assert self._structure is not None
        self._bound[key] = Bound(cache, self._structure.indices, states)
        return self._bound[key]

    def _wait(self, ids: Tensor) -> None:
        """A tape's buffers are those of its last run: on another stream, that has to be over first."""
        if self.device_type == "cuda":
            raw = torch._C._cuda_getCurrentRawStream(ids.get_device())  # a tenth of what its object takes
            if raw != self._raw_stream:
                stream = torch.cuda.current_stream(ids.device)
                if self._stream is not None:
                    stream.wait_stream(self._stream)
                self._stream, self._raw_stream = stream, raw

    def _why_not_now(self, root: Any, ids: Tensor, arguments: dict[str, Any]) -> str:
        """What of a call's circumstances, rather than of the model, rules a tape out."""
        if ids.device.type != self.device_type:
            return f"input_ids on {ids.device.type}"
        if root.training:
            return "training mode"
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if torch.is_autocast_enabled(self.device_type):
            return "autocast"
        if self.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller captures a CUDA graph"
        if nn.modules.module._has_any_global_hook():
            return "global module hooks"
        config = self._config
        if config is None or not config.holds(root.config):
            config = self._config = Config(root.config)
        for name, value in arguments.items():
            if name in _NEUTRAL:
                if not any(value is neutral for neutral in _NEUTRAL[name]):
                    return f"argument {name}"
            elif name == "logits_to_keep":
                if type(value) is not int:
                    return "argument logits_to_keep"
            elif name == "use_cache":
                if not (config.use_cache if value is None else value):
                    return "argument use_cache"
            elif name not in ("attention_mask", "position_ids"):
                return f"argument {name}"
        if not config.return_dict and arguments.get("return_dict") is None:
            return "config.return_dict"
        for name in config.outputs:
            if arguments.get(name) is None:
                return f"config.{name}"
        return ""

    def _survey(self, root: Any) -> str:
        """Find what a tape needs of the model; returns why there can be none, or the empty string."""
        self._attention, self._mixers = [], []
        devices = {parameter.device for parameter in root.parameters()}
        if len(devices) != 1:
            return f"the weights are on several devices ({', '.join(sorted(map(str, devices)))})"
        device = devices.pop()
        if device.type != self.device_type:
            return f"the weights are on {device.type}"
        for name, module in root.named_modules():
            if "_hf_hook" in module.__dict__:
                return f"accelerate's hooks ({name or type(module).__name__})"
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if not captures(hook):
                    return f"a hook on {name or type(module).__name__}"
            if not type(module).__module__.startswith(("torch.nn.", "transformers.")):
                return f"{name} is a {type(module).__module__}.{type(module).__name__}"
            if match(module) is not None:
                fault = _not_fast(module, self.device_type)
                if fault:
                    return f"{name}: {fault}"
                self._mixers.append(module)
            elif type(module).__name__ in self._family.attention:
                self._attention.append(module)
        self._indices = [mixer.layer_idx for mixer in self._mixers]
        return "" if self._mixers else "the model has no Mamba-2 layer"

    def _look_at(self, cache: Any, convs: list[Tensor], ssms: list[Tensor], ids: Tensor) -> str:
        """Check the states of a cache that a tape has not seen."""
        for index in self._indices:
            if cache_layer(cache, index) is None:
                return "unknown kind of cache"
        for tensors in (convs, ssms):
            kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
            if kinds != {(ids.device, tensors[0].dtype)}:
                return "the cache's states differ in device or dtype"
            if any(tensor.shape[0] != ids.shape[0] for tensor in tensors):
                return "the cache's states are of another batch size"
            if any(tensor.data_ptr() % 16 for tensor in tensors) or not all(t.is_contiguous() for t in tensors):
                return "the cache's states are not contiguous, or not aligned"
        return ""

    def _record(self, root: Any, key: Any, ids: Tensor, cache: Any, states: list[tuple[Tensor, Tensor]]) -> str:
        """Make a tape. Returns why it could not be made, or the empty string."""
        if not recording.lock.acquire(blocking=False):
            return _BUSY
        try:
            if self._capture is None:
                self._capture = type(self).capture(ids.device)
            with torch.inference_mode(False), torch.no_grad():
                static_ids = torch.zeros_like(ids)
                static_ids.copy_(ids)
                tape = Tape(self._capture, self._mixers, states)
                arguments: dict[str, Any] = {
                    "input_ids": static_ids,
                    self._family.cache: cache,
                    "use_cache": True,
                    "return_dict": True,
                    "attention_mask": _Masks() if self._attention else None,
                }
                if self._attention:
                    arguments["position_ids"] = torch.zeros_like(ids)
                structure = self._structure
                assert structure is not None
                output = tape.record(
                    lambda: type(root).forward(root, **arguments), self._attention, structure.layers, structure.cuts
                )
                for name, value in output.items():
                    if value is not cache and not isinstance(value, Tensor):
                        return f"output {name} is a {type(value).__name__}"
        except NotRecordable as error:
            return str(error)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            return f"recording failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            recording.lock.release()
        self._tapes[key] = (tape, static_ids, _without(output, cache))
        while len(self._tapes) > MOST_TAPES:
            old, _ = self._tapes.popitem(last=False)
            self._bound.pop(old, None)
        if sum(tape.bytes for tape, _, _ in self._tapes.values()) > MOST_BYTES:
            self._tapes.clear()
            self._bound.clear()
            self._capture = None
            return f"graphs would take more than {MOST_BYTES >> 30} GiB"
        return ""

    def _go_on(self, root: Any, point: Point, ids: Tensor, cache: Any, fresh: Callable[[], dict[str, Any]]) -> Any:
        """The rest of a token whose first layers have run from a tape, when what comes next has changed since."""
        assert self._structure is not None
        layers = self._structure.layers
        if self._structure.holds(point.part):
            self._bound.clear()
            self._last = None
            self.eager["the cache has changed"] += 1
        else:
            self.clear()
            self.eager[_CHANGED] += 1
        made = fresh()
        arguments: dict[str, Any] = {
            "input_ids": ids,
            self._family.cache: cache,
            "use_cache": True,
            "return_dict": True,
        }
        if made:
            arguments |= {"attention_mask": _Masks(made["attention_mask"]), "position_ids": made["position_ids"]}
        return go_on(point, lambda: type(root).forward(root, **arguments), layers)

    def _why_not_fresh(self, root: Any, arguments: dict[str, Any]) -> str:
        """Why `_fresh` cannot be made of a call's arguments, or the empty string."""
        if not self._attention:
            return ""
        mask = arguments.get("attention_mask")
        if isinstance(mask, dict) and mask.get("linear_attention") is not None:
            return "one-token step with a mask"
        if getattr(root.base_model, "rotary_emb", None) is not None and arguments.get("position_ids") is None:
            return "no position_ids"
        return ""

    def _fresh(
        self, root: Any, ids: Tensor, cache: Any, arguments: dict[str, Any], made: dict[str, Any]
    ) -> dict[str, Any]:
        """Put into `made` what eager calls need for this token, as the model's own forward makes it; returns it."""
        base = root.base_model
        mask = arguments.get("attention_mask")
        like = torch.empty(*ids.shape, 0, dtype=root.dtype, device=ids.device)
        if isinstance(mask, dict):
            mask = mask.get("full_attention")
        else:
            mask = create_causal_mask(
                config=base.config, inputs_embeds=like, attention_mask=mask, past_key_values=cache
            )
        position_ids = arguments.get("position_ids")
        rotary = getattr(base, "rotary_emb", None)
        made |= {
            "attention_mask": mask,
            "past_key_values": cache,
            "position_embeddings": None if rotary is None else rotary(like, position_ids),
            "position_ids": position_ids,
        }
        return made


class _Masks(dict):
    """The masks of one token, whatever kinds of layer a model asks for: attention's, and none for any other.

    A recording has none at all: real ones come with each token.
    """

    def __init__(self, attention: Tensor | None = None) -> None:
        super().__init__(full_attention=attention)

    def __missing__(self, key: Any) -> None:
        return None


def _without(output: Any, cache: Any) -> Any:
    """An output that does not keep the cache of the recording alive."""
    return type(output)(**{name: True if value is cache else value for name, value in output.items()})


def _not_fast(mixer: Any, device_type: str) -> str:
    """Why a mixer's forward cannot be recorded."""
    from fastmamba.hf.patch import binding_of

    binding = binding_of(mixer)
    if binding is None:
        return "not patched"
    if binding.scope == "ssd":
        return "scope='ssd'"
    if device_type == "cuda" and binding.backend == "torch":
        return "backend='torch'"
    return ""


# Forwards that `make_forward` made, to know them by -> whether they take tapes, and the most tokens of a call.
_forwards: WeakKeyDictionary[Any, tuple[bool, int | None]] = WeakKeyDictionary()
own_stood: WeakSet[Any] = WeakSet()
"""Those that took the place of the class's own forward in a model's __dict__, where unpickling leaves it."""


def remember(function: Any) -> None:
    """Count a function, which takes no tapes itself, among those that `made` knows."""
    _forwards[function] = (False, None)


def made(function: object) -> tuple[bool, int | None] | None:
    """Whether a forward that `make_forward` made takes tapes, and the most tokens of a call; None of any other."""
    return _forwards.get(function) if isinstance(function, types.FunctionType) else None


# Beside the models and not on them: neither a pickle nor a deepcopy of a model carries tapes.
_sessions: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


def session_of(root: nn.Module) -> Session | None:
    """The session of a model whose forward was made by `make_forward`; None before its first one-token call."""
    return _sessions.get(root)


def forget(root: nn.Module) -> None:
    """Drop a model's tapes."""
    session = _sessions.pop(root, None)
    if session is not None:
        session.clear()


def make_forward(root_class: type, family: Family, tapes: bool, most: int | None) -> Callable[..., Any]:
    """A forward for models of a class: one-token calls from `tapes`, calls of more than `most` tokens in pieces."""
    own: Any = root_class.forward
    whole = own if most is None else in_pieces(own, family, most)
    cache_name = family.cache
    attends = bool(family.attention)

    @functools.wraps(own)  # generate() reads the signature
    def forward(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or args or type(input_ids) is not Tensor or input_ids.shape[-1] != 1:
            return whole(self, input_ids, *args, **kwargs)
        if not attends:
            return one(self, input_ids, kwargs)
        with without_cudnn():
            return one(self, input_ids, kwargs)

    def one(self: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get(cache_name)
        if not tapes or cache is None or input_ids.ndim != 2 or not hasattr(cache, "layers"):
            return own(self, input_ids, **kwargs)
        session = _sessions.get(self)
        if session is None:
            session = _sessions[self] = Session(self, family)
        arguments = {name: value for name, value in kwargs.items() if name != cache_name}
        output = session.step(input_ids, cache, arguments)
        return own(self, input_ids, **kwargs) if output is None else output

    # The name is how a bound method is pickled: as getattr(model, "forward"), the class's own forward when loaded.
    forward.__name__ = forward.__qualname__ = "forward"
    _forwards[forward] = (tapes, most)
    return forward
