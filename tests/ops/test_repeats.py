"""Calls that repeat one of the same form, on a GPU: what the long way gives, with other tensors, at other addresses."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmamba.ops import add_rms_norm, causal_conv1d, gated_rms_norm, mixer_prefill, moe, rms_norm, silu_and_mul, ssd
from fastmamba.ops._repeats import Repeats

BF16 = torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _mixer(tokens: int, heads: int = 8, batch: int = 1, **options: Any) -> Callable[[], Any]:
    inner, channels = heads * 64, heads * 64 + 256
    weights = (normal(channels, 1, 4) / 2, normal(channels), normal(heads).abs(), normal(heads), normal(heads) - 3)
    norm = normal(inner)

    def call() -> Any:
        projected = normal(batch, tokens, inner + channels + heads)
        given = {name: value() if callable(value) else value for name, value in options.items()}
        final_conv = torch.zeros(batch, channels, 4, device="cuda", dtype=BF16)
        found = mixer_prefill(
            projected, *weights, norm_weight=norm, final_conv=final_conv, return_final_states=True, **given
        )
        return *found, final_conv  # pyrefly: ignore[not-iterable]

    return call


def _ssd(tokens: int, heads: int = 8, dtype: torch.dtype = BF16, **options: Any) -> Callable[[], Any]:
    weights = (-normal(heads, dtype=torch.float32).abs(), normal(heads), normal(heads))

    def call() -> Any:
        xbc = normal(1, tokens, heads * 64 + 256, dtype=dtype)
        x, B, C = xbc.split((heads * 64, 128, 128), -1)
        dt = normal(1, tokens, heads, dtype=dtype)
        given = {name: value() if callable(value) else value for name, value in options.items()}
        return ssd(
            x.unflatten(-1, (heads, 64)), dt, weights[0], B[:, :, None], C[:, :, None], weights[1],
            dt_bias=weights[2], dt_softplus=True, **given,
        )  # fmt: skip

    return call


def _experts(tokens: int) -> Callable[[], Any]:
    weights = normal(8, 256), normal(8, 256, 256) / 16, normal(8, 256, 128) / 11

    def call() -> Any:
        return moe(normal(2, tokens, 256), *weights, top_k=3, add=normal(2, tokens, 256))

    return call


CASES: dict[str, Callable[[], Callable[[], Any]]] = {
    "mixer": lambda: _mixer(100),
    "mixer in segments": lambda: _mixer(3000),
    "mixer, continued": lambda: _mixer(
        77,
        batch=2,
        initial_conv=lambda: normal(2, 768, 3),
        initial_states=lambda: normal(2, 8, 64, 128, dtype=torch.float32),
        mask=lambda: torch.randint(2, (2, 77), device="cuda"),
    ),
    "ssd": lambda: _ssd(100),
    "ssd with states": lambda: _ssd(3000, return_final_states=True),
    "ssd, gated": lambda: _ssd(100, z=lambda: normal(1, 100, 8, 64)),
    "ssd in float32": lambda: _ssd(100, dtype=torch.float32),
    "ssd, not aligned": lambda: _ssd(100, z=lambda: normal(1, 100, 520)[:, :, 1:513].unflatten(-1, (8, 64))),
    "convolution": lambda: (
        lambda: causal_conv1d(
            normal(2, 70, 640)[:, :, 128:], torch.ones(512, 4, device="cuda"), initial_states=normal(2, 512, 3)
        )
    ),
    "gated norm": lambda: (
        lambda: gated_rms_norm(
            normal(2, 70, 512), torch.ones(512, device="cuda"), normal(2, 70, 640)[:, :, 128:], group_size=128
        )
    ),
    "norm": lambda: lambda: rms_norm(normal(1, 50, 512), torch.ones(512, device="cuda")),
    "sum and norm": lambda: (
        lambda: add_rms_norm(
            normal(2, 50, 512), normal(2, 50, 512, dtype=torch.float32), torch.ones(512, device="cuda"), dtype=BF16
        )
    ),
    "gate": lambda: lambda: silu_and_mul(normal(1, 50, 512)),
    "experts": lambda: _experts(900),
    "experts, few tokens": lambda: _experts(3),
    "experts in pieces": lambda: _experts(20_000),
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was a repeated one; cleared to start a count, full of True where all were."""
    found: list[bool] = []
    again = Repeats.again

    def watched(self: Repeats, *arguments: Any) -> Any:
        result = again(self, *arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(Repeats, "again", watched)
    return found


def long_way(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(Repeats, "again", lambda *_: None)
        patched.setattr(Repeats, "run", lambda self, tensors, options, run, *arguments: run(*arguments))
        return call()


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CASES))
def test_repeated_calls_give_what_the_long_way_gives(
    name: str, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CASES[name]()
    held = []  # so that each round has other addresses
    for seed in range(7):
        torch.manual_seed(seed)
        expected = flat(long_way(call, monkeypatch))
        torch.manual_seed(seed)
        actual = flat(call())
        held.append(actual)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
            assert torch.equal(a, b), (name, seed)
    assert counted == [False, False] + [True] * 5


@pytest.mark.gpu
def test_other_streams_graphs_and_inference_mode(counted: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    call = CASES["mixer in segments"]()
    for _ in range(3):
        call()
    torch.manual_seed(1)
    expected = flat(long_way(call, monkeypatch))
    counted.clear()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        torch.manual_seed(1)
        actual = flat(call())
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, actual, expected)) and all(a.is_inference() for a in actual)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = flat(call())
    for _ in range(2):
        graph.replay()
        assert all(torch.isfinite(a).all() for a in actual)
    assert counted == [True, True]


@pytest.mark.gpu
def test_what_is_never_repeated(counted: list[bool]) -> None:
    x, weight = normal(1, 30, 512), torch.nn.Parameter(torch.ones(512, device="cuda"))
    for _ in range(4):
        assert rms_norm(x, weight).grad_fn is not None
    assert not any(counted)
    counted.clear()
    with torch.no_grad():
        for _ in range(4):
            rms_norm(x, weight)
        assert counted == [False, False, True, True]
        weight.data = torch.full((512,), 2.0, device="cuda")
        assert torch.equal(rms_norm(x, weight), 2 * rms_norm(x, torch.ones_like(weight)))
        weight.data = weight.data.double()
        with pytest.raises(ValueError, match="takes float16"):
            rms_norm(x.double(), weight, backend="triton")
    assert rms_norm(x, weight.float()).grad_fn is not None
