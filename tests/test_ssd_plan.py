"""How the Hopper SSD splits a sequence, on the host: no segment without chunks, no block without a multiprocessor."""

from dataclasses import replace

import pytest

from fastmamba import ssd_plan
from fastmamba.ssd_plan import Plan, plan, scorers

H200 = 132  # multiprocessors
SHAPES = [
    (1, 1, 80),
    (1, 1, 48),
    (1, 1, 24),
    (1, 2, 3),
    (2, 1, 20),
    (3, 2, 5),
    (1, 1, 1),
]  # batch, groups, their slices


@pytest.mark.parametrize("block_slices, wide", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("batch, groups, slices", SHAPES)
def test_every_chunk_is_walked_once(batch: int, groups: int, slices: int, block_slices: int, wide: bool) -> None:
    for chunks in (1, 5, 16, 17, 33, 64, 67, 100, 256, 1024, 2049):
        for segments in (*range(1, min(chunks, 14) + 1), 17, 33, 64):
            found = plan(batch, groups, slices, chunks, segments, block_slices, H200, wide=wide)
            if found.dealt:
                continue
            last = chunks - found.lead - found.more - (found.segments - 1) * found.per_segment
            assert 1 <= last <= found.per_segment + (found.more if found.segments == 1 else 0), found
            step = 1 if block_slices == 1 else 4
            ahead = [0, *(found.ahead(segment, step) for segment in range(1, found.segments))]
            assert max(ahead[1:], default=0) <= found.per_segment, "a first pass is to reach its segment"
            if found.leaders:
                assert found.ahead(0, step) == found.lead
            for lead in range(0, found.most + 1, found.unit) if found.unit else ():  # whatever is dealt out
                per = -(-(chunks - lead) // found.segments)
                dealt = replace(found, lead=lead, share=(per - lead) / (4 * found.segments))
                assert 1 <= chunks - lead - (found.segments - 1) * per <= per
                assert all(dealt.ahead(segment, step) <= per for segment in range(1, found.segments))


@pytest.mark.parametrize("batch, groups, slices", SHAPES)
def test_leaders_have_multiprocessors_and_slices(batch: int, groups: int, slices: int) -> None:
    for segments in range(1, 12):
        found = plan(batch, groups, slices, 1024, segments, 2, H200)
        blocks = groups * found.blocks_per_group
        if found.leaders:
            assert batch * (blocks * found.segments + found.leaders) <= H200
            assert found.lead % 4 == 0 < found.lead and blocks <= found.leaders * found.pieces
            assert found.unit or (found.leaders - 1) * found.pieces < blocks
            assert not found.unit or found.leaders <= blocks and found.unit % 4 == 0 == found.most % found.unit
            assert not found.unit or found.most >= found.unit


def test_leaders_finish_with_the_others() -> None:
    for chunks in (256, 300, 1024, 4096):
        found = plan(1, 1, 80, chunks, 3, 2, H200)
        others = ssd_plan._NARROW[2].walk(found.segments, chunks, found.lead)
        assert found.pieces * found.lead <= others < found.pieces * (found.lead + ssd_plan.GROUP) + 4
    found = plan(1, 1, 80, 256, 3, 2, H200)
    assert (found.segments, found.pieces, found.lead) == (3, 4, 24)
    assert (found.leaders, found.unit) == (10, 0)
    dealt = plan(1, 1, 80, 1024, 3, 2, H200)
    assert (dealt.segments, dealt.leaders, dealt.lead, dealt.unit, dealt.most) == (3, 12, 100, 8, 256)
    assert plan(1, 1, 80, 256, 3, 2, 120).leaders == 0


def test_leads_are_dealt_out_where_that_gains_more_than_a_launch_takes() -> None:
    def units(slices: int, segments: int, chunks: tuple[int, ...], one_head: bool) -> list[int]:
        return [plan(1, 1, slices, n, segments, 2, H200, one_head=one_head).unit for n in chunks]

    assert units(80, 3, (128, 192, 256, 512, 1024), True) == [0, 0, 4, 4, 8]
    assert units(80, 3, (256, 512, 1019, 1024), False) == [0, 0, 0, 8]
    assert units(72, 3, (256, 512, 1024), True) == [0, 0, 8]  # with twice as many leaders, the same leads will do
    assert units(84, 3, (256, 1024), True) == [0, 8]  # with half as many, leads are short
    assert units(96, 2, (256, 512, 704), True) == [0, 0, 8]


@pytest.mark.parametrize("batch, groups, slices", SHAPES)
def test_dealt_blocks_have_a_multiprocessor_each(batch: int, groups: int, slices: int) -> None:
    for chunks in (64, 128, 1024):
        for segments in range(1, 12):
            found = plan(batch, groups, slices, chunks, segments, 2, H200, wide=True)
            blocks = groups * found.blocks_per_group
            assert (found.dealt > 0) == (chunks >= 128 and segments > 1 and batch * blocks * segments <= H200)
            if found.dealt:
                assert blocks * segments <= found.dealt <= H200 // batch
                assert segments <= found.segments <= ssd_plan.MOST_DEALT


@pytest.mark.parametrize("batch, blocks, segments", [(1, 24, 5), (1, 24, 2), (2, 12, 5), (1, 40, 3), (1, 48, 1)])
def test_blocks_that_score_take_what_is_left(batch: int, blocks: int, segments: int) -> None:
    scoring = scorers(batch, 1, Plan(blocks, segments, 51), H200)
    assert 0 <= scoring <= 51
    assert batch * segments * (blocks + scoring) <= H200 or scoring == 0


def test_groups_are_scored_by_a_launch() -> None:
    assert scorers(2, 2, Plan(2, 3, 12), H200) == 0
