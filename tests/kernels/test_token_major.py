"""The copy of channel-major activations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastmamba.kernels.token_major import token_major  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton's interpreter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(1, 7, 1, 64), (2, 130, 3, 64), (2, 257, 1, 48)])
def test_channels_come_side_by_side(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """x is a part of what a convolution with more tokens and channels gave."""
    whole = torch.randn(batch, heads * width + 16, tokens + 3, device=DEVICE).to(dtype)
    x = whole.transpose(1, 2)[:, :tokens, 8 : 8 + heads * width].unflatten(-1, (heads, width))
    y = token_major(x)
    assert y.is_contiguous() and torch.equal(y, x)


def test_what_is_laid_out_otherwise() -> None:
    x = torch.randn(2, 5, 3, 64, device=DEVICE)
    assert token_major(x) is x and token_major(x[:, :, :2]).data_ptr() == x.data_ptr()
    for other in (x[..., ::2], x.transpose(1, 3).contiguous().transpose(1, 3)[:, :, ::2]):
        assert other.stride(3) != 1
        assert torch.equal(token_major(other), other) and token_major(other).stride(3) == 1


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    tokens, channels = 2**20, 2304
    x = torch.zeros(1, channels, tokens, device="cuda", dtype=torch.bfloat16)
    x[:, -1, -1000:] = 1
    y = token_major(x.transpose(1, 2).unflatten(-1, (36, 64)))
    assert y.flatten(2)[0, -1000:, -1].eq(1).all() and y.sum() == 1000
