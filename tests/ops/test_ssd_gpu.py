"""What only a GPU can show of the SSD: the same bits always, streams, graphs, and offsets past 2**31."""

from __future__ import annotations

import pytest
import torch

from fastmamba.ops import ssd
from fastmamba.testing import SsdCase, relative_error, ssd_case

pytestmark = pytest.mark.gpu


def run(case: SsdCase) -> tuple[torch.Tensor, torch.Tensor]:
    return ssd(*case.arguments(), **case.keywords(), backend="triton")


def mamba2_2b7(tokens: int, seed: int = 0) -> SsdCase:
    return ssd_case(1, tokens, 80, 64, 1, 128, dtype=torch.bfloat16, device="cuda", seed=seed, initial=True)


def test_the_same_bits_every_time() -> None:
    case = mamba2_2b7(5000)
    first = run(case)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(case), first, strict=True))


def test_the_same_bits_on_two_streams_at_once() -> None:
    cases = [mamba2_2b7(20_000, seed) for seed in (1, 2)]
    expected = [run(case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(case))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_same_bits_in_a_cuda_graph() -> None:
    case = mamba2_2b7(5000)
    expected = run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, final = run(case)
    for _ in range(10):
        y.fill_(torch.nan)
        final.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected[0]) and torch.equal(final, expected[1])


def test_no_synchronization_with_the_host() -> None:
    case = mamba2_2b7(5000)
    run(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_output_is_written() -> None:
    case = mamba2_2b7(4999)
    poison = [torch.full((1 << 26,), torch.nan, device="cuda") for _ in range(2)]
    del poison  # the allocator hands this memory out next
    y, final = run(case)
    assert y.isfinite().all() and final.isfinite().all()


def test_256k_tokens_of_128_heads_equal_eight_segments() -> None:
    """The projection of such a call has 2**18 * 16768 elements: more than a 32-bit offset reaches."""
    tokens = 1 << 18
    case = ssd_case(1, tokens, 128, 64, 1, 128, dtype=torch.bfloat16, device="cuda", gate=True)
    whole, final = run(case)
    x, dt, A, B, C, D, z, bias, state = case.arguments()
    worst = 0.0
    for first in range(0, tokens, tokens // 8):
        part = slice(first, first + tokens // 8)
        piece = SsdCase(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, z[:, part], bias, state)
        y, state = run(piece)
        worst = max(worst, relative_error(whole[:, part], y))
    # the two split the sequence at other places: they differ by roundings of bfloat16, not more
    assert worst < torch.finfo(torch.bfloat16).eps
    assert relative_error(final, state) < torch.finfo(torch.bfloat16).eps
