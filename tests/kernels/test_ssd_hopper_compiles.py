"""The Hopper variant of the SSD compiles with the Triton that is installed; it takes no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# In a process of its own: Triton's interpreter, which other tests turn on, has no Gluon.
_PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from fastmamba.kernels import ssd_hopper

pair, split, gated = (value == "1" for value in sys.argv[1:])
width, dtype, layout = 64, "bf16", repr(ssd_hopper._TILE)
constants = {
    "N": width, "SLICES": 1, "PAIR": 1 + pair, "SOFTPLUS": True, "CLAMP": False, "GATED": gated, "STORE_FINAL": True,
    "SPLIT": split, "RELAXED": False, "STAGES": 2, "LOG_A": True, "Y_SCALE": 1.0, "init_ptr": None,
}
if not gated:
    constants["z_desc"] = None
floats = ("final_ptr", "handed_ptr")
signature, constexprs = {}, {}
for place, parameter in enumerate(ssd_hopper._kernel.params):
    name = parameter.name
    if name in constants:
        signature[name], constexprs[place,] = "constexpr", constants[name]
    elif name.endswith("_desc"):
        channels = width if name[0] in "BC" else 64
        signature[name] = f"tensordesc<{dtype}[1, 64, {channels}],{layout}>"
    elif name.endswith("_ptr"):
        signature[name] = "*i32" if name == "sync_ptr" else "*fp32" if name in floats else "*" + dtype
    else:
        signature[name] = "fp32" if name in ("dt_min", "dt_max") else "i32"
source = GluonASTSource(ssd_hopper._kernel, signature, constexprs)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.asm["cubin"]
assert compiled.metadata.shared <= 227 * 1024
"""


@pytest.mark.parametrize("form", [("0", "0", "1"), ("1", "1", "0")], ids=["one slice, gate", "two slices, segments"])
def test_compiles_for_hopper(form: tuple[str, str, str]) -> None:
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *form], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
