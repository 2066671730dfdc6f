"""PTX for racecheck: every thread of a role arrives, an mbarrier counts as many, nothing unknown is passed over."""

import pytest

from evals.racecheck_ptx import followed

KERNEL = """
	@%p6 mbarrier.init.shared::cta.b64 [%r27], 1;
	@%p6 mbarrier.init.shared::cta.b64 [%r28], 2;
	bar.sync 	0, 128;
	barrier.sync 	1;
	@%p7 mbarrier.arrive.expect_tx.shared.b64 _, [%r27], 16384;
	bar.sync 	0, 128;
	@%p6 mbarrier.arrive.shared::cta.b64 _, [%r28];
	bar.warp.sync 	-1;
	@%p4 mbarrier.arrive.shared::cta.b64 _, [%r28], 2;
"""


def test_every_thread_arrives() -> None:
    lines = [line.strip() for line in followed(KERNEL).splitlines()]
    assert "@%p6 mbarrier.init.shared::cta.b64 [%r27], 128;" in lines
    assert "@%p6 mbarrier.init.shared::cta.b64 [%r28], 256;" in lines
    # one thread starts a copy, and stands for 128 arrivals: 127 and the one that expects bytes
    expect = lines.index("@%p7 mbarrier.arrive.expect_tx.shared.b64 _, [%r27], 16384;")
    assert lines[expect - 1] == "@%p7 mbarrier.arrive.shared::cta.b64 _, [%r27], 127;"
    assert "mbarrier.arrive.shared::cta.b64 _, [%r28], 1;" in lines  # each of 128
    assert "mbarrier.arrive.shared::cta.b64 _, [%r28], 8;" in lines  # each of 32, 256 in all: two arrivals as before
    assert sum("nanosleep" in line for line in lines) == 1


@pytest.mark.parametrize(
    "line",
    ["mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];", "mbarrier.arrive.noComplete.b64 %rd1, [%r1], 1;"],
)
def test_unknown_arrivals_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not known here"):
        followed(line)


def test_an_arrival_of_nobody_knows_whom_is_refused() -> None:
    with pytest.raises(ValueError, match="meeting of 0 threads"):
        followed("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];")


def test_other_kernels_stay_as_they_are() -> None:
    ptx = "\tadd.s32 %r1, %r2, %r3;\n\tbar.sync 0;\n"
    assert followed(ptx) == ptx
