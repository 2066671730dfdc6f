"""How the Hopper SSD splits a sequence, on the host: no segment without chunks, no block without a multiprocessor."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from fastmamba.kernels import ssd_hopper  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_hopper, "multiprocessors", lambda device: 132)


@pytest.mark.parametrize("chunks", [1, 5, 16, 17, 33, 64, 67, 100, 256, 1024, 2049])
def test_a_longer_first_segment_leaves_chunks_for_the_last(chunks: int) -> None:
    for asked in range(1, min(chunks, 64) + 1):
        each = -(-chunks // asked)
        segments = -(-chunks // each)
        more = ssd_hopper._more(segments, each)
        each = -(-(chunks - more) // segments)
        assert chunks - more - (segments - 1) * each >= 1, (asked, segments, each, more)


@pytest.mark.parametrize(
    "batch, blocks, segments", [(1, 24, 5), (1, 24, 2), (2, 12, 5), (1, 40, 3), (1, 48, 1), (3, 2, 3)]
)
def test_blocks_that_score_take_what_is_left(batch: int, blocks: int, segments: int) -> None:
    scorers = ssd_hopper._scorers(CPU, batch, 1, blocks, segments, 51)
    assert 0 <= scorers <= 51
    assert batch * segments * (blocks + scorers) <= 132 or scorers == 0


def test_groups_are_scored_by_a_launch() -> None:
    assert ssd_hopper._scorers(CPU, 2, 2, 2, 3, 12) == 0
