"""The portable SSD kernel fits the registers and shared memory that its configurations count on; it takes no GPU."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.kernels.sass import spills_beside_products
from tests.versions import LOWEST

# In a process of its own: other tests turn Triton's interpreter on.
_PROGRAM = """
import os
import pathlib
import re
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmamba import configs
from fastmamba.kernels import ssd_portable

capability, heads, head_dim, width = map(int, sys.argv[1:])
described = capability >= 90
limit = {80: 163, 90: 227}[capability] * 1024
configs._limits = lambda device: configs._Limits(132, limit, described)
config = configs._portable(torch.device("cpu"), torch.bfloat16, 1, 16384, heads, head_dim, width, None)
kernel = ssd_portable._ssd_kernel
parts = ssd_portable._parts(config, False)
run_on = described and ssd_portable._runs_on(config, parts)
step, stages = ssd_portable._first_pass(config, 2) if described else (config.chunk, config.stages)
constants = {
    "P": head_dim, "N": width, "Q": config.chunk, "QS": step, "STEP_STAGES": stages,
    "BP": config.block_p, "BN": config.block_n, "PARTS": parts, "R": config.rows,
    "SOFTPLUS": True, "CLAMP": False, "STEPS": False, "D_PER_HEAD": True, "D_PER_CHANNEL": False, "STORE_FINAL": True,
    "SPLIT": True, "RELAXED": False, "PRECISION": "tf32", "DESCRIBED": described, "STAGES": config.stages,
    "LOG_A": True, "Y_SCALE": 1.0, "ENGINE": described, "RUN_ON": run_on, "init_ptr": None,
    "z_ptr": None, "TWICE": ssd_portable._twice(config, parts),
}
if not config.scores:
    constants["scores"] = None
if config.blocks == 1:
    constants["dealt_ptr"] = None
tiles = {"x": config.block_p, "y": config.block_p, "B": config.block_n // parts, "C": config.block_n // parts}
tiles |= {"x_sum": config.block_p, "B_sum": config.block_n}
rows = {"number_sum": f"1, {step}", "early_numbers": f"2, {config.chunk}", "numbers": f"4, {config.chunk}"}
if not described:
    constants |= dict.fromkeys(rows)
elif not constants["TWICE"]:
    constants["early_numbers"] = None
rows["scores"] = f"{config.chunk}, {config.chunk}"
floats = ("final_ptr", "handed_ptr", "passed_ptr", "nums_ptr", "scores", "own_ptr")
signature, constexprs, attributes = {}, {}, {}
for place, parameter in enumerate(kernel.params):
    name = parameter.name
    if name in constants:
        signature[name], constexprs[place,] = "constexpr", constants[name]
    elif name in tiles and described:
        signature[name] = f"tensordesc<bf16[1, {step if name.endswith('_sum') else config.chunk}, {tiles[name]}]>"
    elif name in rows and described:
        signature[name] = f"tensordesc<fp32[{rows[name]}]>"
    elif name in ("dt_min", "dt_max"):
        signature[name] = "fp32"
    else:
        pointer = name in tiles or name in rows or name.endswith("_ptr")
        kind = "*i32" if name in ("sync_ptr", "dealt_ptr") else "*fp32" if name in floats else "*bf16"
        signature[name] = kind if pointer else "i32"
        if pointer or name == "lead" or name.startswith("stride"):
            attributes[place,] = [["tt.divisibility", 16]]
options = {"num_warps": config.warps, "num_stages": config.stages}
if config.registers < configs.MOST_REGISTERS:
    options["maxnreg"] = config.registers
source = ASTSource(kernel, signature, constexprs, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
blocks = 65536 // (config.registers // 8 * 8 * 32 * config.warps)  # that the registers leave room for
pathlib.Path(os.environ["TRITON_CACHE_DIR"], "cubin").write_bytes(compiled.asm["cubin"])
print("blocks", blocks, "shared", compiled.metadata.shared)
waits = set(re.findall(r"wgmma.wait_group\\S* (\\d+)", compiled.asm["ptx"]))
assert waits <= {"0"}, waits  # what runs on in pieces does not keep its operand's registers from being written
assert blocks * (compiled.metadata.shared + 1024) <= limit + 1024
"""


@pytest.mark.parametrize(
    ("target", "blocks", "spilt", "beside"),
    [
        # what is left out takes one register more, which the newest Triton spills before and behind the loops
        (("90", "80", "64", "128"), 3, 64 if LOWEST else 68, 0),
        # a product that runs on gains more than these four cost, as measured
        (("90", "24", "128", "256"), 1, 768, 4),
        (("80", "24", "128", "256"), 1, 512, 0),
    ],
    ids=["state of 128", "state of 256", "state of 256, no copy engine"],
)
def test_fits(target: tuple[str, ...], blocks: int, spilt: int, beside: int, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton")
    if not LOWEST and blocks < 3:
        pytest.skip("ten seconds: on the lowest Triton alone, beside the lowest transformers")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"blocks {blocks} " in done.stdout
    assert "serialized" not in done.stdout, done.stdout  # matrix products that are to run at the same time
    (stores,) = re.findall(r"(\d+) bytes spill stores", done.stdout)
    assert int(stores) <= spilt, done.stdout
    if target[0] == "90":
        assert len(spills_beside_products(tmp_path / "cubin")) <= beside
