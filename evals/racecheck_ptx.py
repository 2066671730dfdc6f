"""Kernels in a form that racecheck can follow: the same accesses in the same order, told in its own terms.

Of compute-sanitizer 2025.3, by experiment (`racecheck_control.py`):

- It orders by an mbarrier what the arriving threads did before, nobody else. Triton's code has one thread arrive for a
  whole role, after a barrier among its threads. Here each of them arrives, and an mbarrier counts so many more.
- Its records of a block-wide barrier and of what other warps do right after it come in any order. They meet there to
  start roles and to end them, and each sleeps a while here afterwards. A sleep orders nothing: without the barrier the
  hazard is still one. Of 132 long blocks it reported hundreds of such hazards without sleeps, 5 to 9 with 2 ms, none
  with 16 ms, on a GPU that no other process used; beside others, which take turns on it, 9 all the same.
- It does not see `stmatrix`, nor what the copy engine and matrix products read and write.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ARRIVALS = 128
"""For each that there was: those of a role of four warps, once each, of one warp, four times each."""
_INIT = re.compile(r"(@%p\d+ )?mbarrier\.init\.shared::cta\.b64 (\[.*?\]), (\d+);")
_ARRIVE = re.compile(r"(?:@%p\d+ )?mbarrier\.arrive\.shared::cta\.b64 _, (\[.*?\])(?:, (\d+))?;")
_EXPECT = re.compile(r"(@%p\d+ )?mbarrier\.arrive\.expect_tx\.shared(?:::cta)?\.b64 _, (\[.*?\]), \d+;")
_MEETING = re.compile(r"bar\.sync\s+\S+ (\d+);")
_ALL = re.compile(r"barrier\.sync\s+1;")
_SLEEP = "nanosleep.u32 1000000;" * 16  # one lasts a millisecond at most


def followed(ptx: str) -> str:
    """PTX of a kernel, as Triton has written it, for racecheck.

    Raises:
        ValueError: an arrival of a form that is not known here.
    """
    lines = []
    threads = 0  # of the role: Triton has them meet before one arrives for all
    for line in ptx.splitlines():
        text = line.strip()
        if text.startswith("bar.warp.sync"):
            threads = 32
        elif meeting := _MEETING.match(text):
            threads = int(meeting[1])
        if init := _INIT.match(text):
            line = f"{init[1] or ''}mbarrier.init.shared::cta.b64 {init[2]}, {int(init[3]) * _ARRIVALS};"
        elif expect := _EXPECT.match(text):  # by the thread that starts a copy, which writes nothing itself
            lines.append(f"{expect[1] or ''}mbarrier.arrive.shared::cta.b64 _, {expect[2]}, {_ARRIVALS - 1};")
        elif arrive := _ARRIVE.match(text):
            if threads not in (32, 64, 128):
                raise ValueError(f"ptx: {text!r} comes after a meeting of {threads} threads; 32, 64 and 128 are known")
            line = f"mbarrier.arrive.shared::cta.b64 _, {arrive[1]}, {int(arrive[2] or 1) * _ARRIVALS // threads};"
        elif "mbarrier.arrive" in text:
            raise ValueError(f"ptx: {text!r} is an arrival of a form that is not known here")
        elif _ALL.match(text):
            line = f"{text} {_SLEEP}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def install() -> None:
    """Have Triton compile every kernel of this process from `followed` PTX, into a cache of its own."""
    from triton import knobs

    settings: Any = knobs
    form = "racecheck-" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    settings.cache.dir = str(Path(settings.cache.dir) / form)  # Triton 3.6 does not tell kernels apart by a hook

    def hook(*arguments: Any) -> Any:
        if not arguments:  # later versions than 3.6 ask what to remember a kernel by
            return form, form
        stages: dict[str, Callable[[Any, Any], Any]] = arguments[1]
        written = stages["ptx"]
        stages["ptx"] = lambda source, metadata: followed(written(source, metadata))
        return None

    settings.runtime.add_stages_inspection_hook = hook
