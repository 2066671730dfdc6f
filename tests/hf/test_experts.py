"""scope="block": mixtures of experts as one op, where Triton serves."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastmamba
from fastmamba.hf import experts as our_experts
from tests.hf.models import build, run, tokens
from tests.versions import SECOND

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter
SIZES = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "mamba_n_groups": 1}
# Kernels that transformers picks up on a GPU multiply float32 in TF32.
CLOSE = 2e-4 if DEVICE == "cpu" else 3e-3
_built: list[nn.Module] = []


@pytest.fixture
def original() -> nn.Module:
    if not _built:
        _built.append(build("granite", **SIZES))
    return copy.deepcopy(_built[0]).to(DEVICE)


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the op."""
    calls: list[Any] = []
    own = our_experts.moe
    monkeypatch.setattr(our_experts, "moe", lambda *args, **kwargs: calls.append(kwargs) or own(*args, **kwargs))
    return calls


def patched(model: nn.Module, backend: str = "triton", scope: str = "block") -> nn.Module:
    model = copy.deepcopy(model)
    fastmamba.patch(model, backend=backend, scope=scope, cuda_graphs="off")
    return model


def mixture(model: nn.Module) -> nn.Module:
    return model.model.layers[0].block_sparse_moe


X = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
IDS = tokens(1, 6).to(DEVICE)


def assert_same(fast: nn.Module, original: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(mixture(fast)(X), mixture(original)(X), rtol=2e-4, atol=2e-4)


def expert_calls(model: nn.Module) -> dict[str, int]:
    return fastmamba.report(model).blocks.expert_calls


def test_experts_are_ours(original: nn.Module, mixed: list[Any]) -> None:
    """In one pass with the sum that follows."""
    fast = patched(original)
    expected = run(original, IDS)[0]
    torch.testing.assert_close(run(fast, IDS)[0], expected, rtol=CLOSE, atol=CLOSE)
    assert len(mixed) == 2 and all(call["add"] is not None for call in mixed)
    assert fastmamba.report(fast).blocks.original_calls == expert_calls(fast) == {}
    assert_same(fast, original)
    assert len(mixed) == 3 and mixed[-1]["add"] is None
    fastmamba.unpatch(fast)
    assert all("forward" not in module.__dict__ for module in fast.modules())
    assert torch.equal(run(fast, IDS)[0], expected) and len(mixed) == 3


def test_plain_pytorch_leaves_them_alone(original: nn.Module, mixed: list[Any]) -> None:
    fast = patched(original, "torch")
    run(fast, IDS)
    assert expert_calls(fast) == {}
    for model in (fast, patched(original, scope="mixer")):
        assert_same(model, original)
    assert mixed == []


called: list[nn.Module] = []


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, *_: called.append(module))


class Kind(torch.Tensor):
    """A weight that is quantised or spread over GPUs, say."""


class Other(nn.Module):
    """An adapter's, say."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, *args: Any) -> Any:
        return self.own(*args)


CHANGES = {
    "a hook on the router": (lambda m: _hook(m.router), our_experts.HOOKS),
    "a hook on the experts": (lambda m: _hook(m.experts), our_experts.HOOKS),
    "a hook on the activation": (lambda m: _hook(m.experts.act_fn), our_experts.HOOKS),
    "a hook on the whole": (_hook, ""),
    "another forward": (
        lambda m: setattr(m.experts, "forward", lambda *args: type(m.experts).forward(m.experts, *args)),
        our_experts.HOOKS,
    ),
    "another module": (lambda m: setattr(m, "experts", Other(m.experts)), our_experts.KIND),
    "another activation": (lambda m: setattr(m.experts, "act_fn", nn.GELU()), our_experts.KIND),
    "weights of their own kind": (
        lambda m: setattr(m.experts, "down_proj", nn.Parameter(m.experts.down_proj.data.as_subclass(Kind))),
        our_experts.FORM,
    ),
    "strides": (
        lambda m: setattr(m.experts.down_proj, "data", m.experts.down_proj.data.mT.contiguous().mT),
        our_experts.FORM,
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_when_they_are_called_as_modules(original: nn.Module, mixed: list[Any], name: str) -> None:
    """A module with a hook is called; what is not transformers' own is left alone, and counted."""
    change, reason = CHANGES[name]
    fast = patched(original)
    for model in (fast, original):
        change(mixture(model))
    called.clear()
    assert_same(fast, original)
    assert len(called) == (2 if "hook" in name else 0)  # one of each model
    assert len(mixed) == (name == "a hook on the whole")
    assert expert_calls(fast) == ({reason: 1} if reason else {})
    assert not reason or f"1x transformers' experts: {reason}" in str(fastmamba.report(fast))


def test_another_way_to_compute_experts(original: nn.Module, mixed: list[Any]) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    called.clear()

    def mine(*args: Any) -> torch.Tensor:
        called.append(args)
        return batched_mm_experts_forward(*args)

    fast = patched(original)
    ALL_EXPERTS_FUNCTIONS["mine"] = mine
    try:
        fast.config._experts_implementation = "mine"
        assert_same(fast, original)
        ours, original.config._experts_implementation = run(fast, IDS)[0], "mine"
        torch.testing.assert_close(ours, run(original, IDS)[0], rtol=CLOSE, atol=CLOSE)
    finally:
        del ALL_EXPERTS_FUNCTIONS["mine"]
    assert len(called) == 5 and mixed == []  # the mixture alone, two layers of each
    assert expert_calls(fast) == {our_experts.WAY: 3}


def test_a_class_whose_forward_was_replaced(
    original: nn.Module, mixed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called, and the report says so."""
    cls = type(mixture(original).experts)
    own = cls.forward
    called.clear()
    monkeypatch.setattr(cls, "forward", lambda self, *args: called.append(self) or own(self, *args))
    fast = patched(original)
    assert_same(fast, original)
    assert len(called) == 2 and mixed == []
    assert "transformers' experts: the forward of class GraniteMoeHybridExperts was replaced" in str(
        fastmamba.report(fast)
    )


def test_autocast(original: nn.Module, mixed: list[Any]) -> None:
    fast = patched(original)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(fast, original)
    assert mixed == [] and expert_calls(fast) == {our_experts.AUTOCAST: 1}


def test_after_outputs_were_collected(original: nn.Module, mixed: list[Any]) -> None:
    """Hooks that transformers then leaves on routers (5.15 leaves none there) mean nothing to later calls."""
    with torch.no_grad():
        original(IDS, output_hidden_states=True)
    fast = patched(original)
    assert_same(fast, original)
    assert len(mixed) == 1 and expert_calls(fast) == {}


@pytest.mark.filterwarnings("ignore::fastmamba.FastMambaWarning")
def test_gradients_and_training(original: nn.Module, mixed: list[Any]) -> None:
    fast = patched(original)
    fast(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in fast.parameters())
    with torch.no_grad():
        fast.train()(IDS)
    for parameter in fast.parameters():
        parameter.requires_grad_(False)
    layer = mixture(fast.eval())
    assert layer(X.clone().requires_grad_()).grad_fn is not None
    assert mixed == [] and expert_calls(fast) == {}
    assert layer(X).grad_fn is None and len(mixed) == 1


def test_a_pickle_and_a_copy(original: nn.Module, mixed: list[Any]) -> None:
    """A copy is patched and works on its own weights; a pickle loads unpatched."""
    fast = patched(original)
    copied = copy.deepcopy(fast)
    for model in (copied, original):
        mixture(model).experts.down_proj.data.mul_(-2.0)
    assert_same(copied, original)
    loaded = pickle.loads(pickle.dumps(copied.cpu())).to(DEVICE)
    assert_same(loaded, original)
    assert len(mixed) == 1


@pytest.mark.skipif(
    SECOND, reason="ten seconds; compilation of whole models is tested on both versions of transformers"
)
@pytest.mark.filterwarnings("error:Dynamo detected")
def test_compiled(original: nn.Module) -> None:
    """No graph break, nothing that some versions of torch refuse to trace, no graph for each length or eager call."""
    attention = patched(original).model.layers[1]
    graphs: list[Any] = []
    torch._dynamo.reset()
    compiled = torch.compile(
        attention, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    with torch.no_grad():
        for length in (6, 9, 7):
            x = torch.randn(2, length, 32, device=DEVICE)
            torch.testing.assert_close(compiled(x), attention(x))
    assert len(graphs) == 1
    assert [node.target for node in graphs[0].graph.nodes].count(torch.ops.fastmamba.moe) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more(original: nn.Module, dtype: torch.dtype) -> None:
    fast, plain = mixture(patched(original)), mixture(original)
    x = torch.randn(3, 1000, 32, device="cuda").to(dtype)
    with torch.no_grad():
        for module in (fast, plain):
            module.to(dtype)
            # logits that no rounding can order in another way
            module.router.weight.copy_(torch.eye(4, 32))
        x[..., :4] = torch.rand(3, 1000, 4, device="cuda").argsort(-1)
        exact = copy.deepcopy(plain).float()
        exact.experts.config = copy.deepcopy(exact.experts.config)
        exact.experts.config._experts_implementation = "eager"
        true = exact(x.float())
        errors = [(module(x).float() - true).norm().item() for module in (fast, plain)]
    assert errors[0] <= errors[1]


@pytest.mark.gpu
def test_compiled_and_recorded(original: nn.Module, mixed: list[Any]) -> None:
    """No graph break, and a batch of one-token calls in CUDA graphs, however the model computes experts."""
    fast = copy.deepcopy(original)
    fastmamba.patch(fast, backend="triton")
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(mixture(fast), fullgraph=True, backend="aot_eager")(X), mixture(fast)(X)
        )
    assert len(mixed) == 2
    for model in (fast, original):
        model.config._experts_implementation = "eager"
    ids = tokens(3, 9).cuda()
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), original.generate(ids, **options))
    (graphs,) = fastmamba.report(fast).graphs
    assert graphs.replays > 0 and graphs.eager_calls == {}
