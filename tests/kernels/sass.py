"""Reading compiled kernels."""

import pathlib
import re
import subprocess


def spills_beside_products(cubin: pathlib.Path) -> list[str]:
    """Instructions on spilt registers in the innermost loops that have products of matrices, of a kernel for Hopper.

    Spills before and after such a loop cost little; in it, everybody waits for them.
    """
    from triton import knobs

    command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    places = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        # Not what is always taken: that comes back from the retries of a wait, which lie behind all else.
        target = re.search(r"@!?U?P\d\s+BRA\b.*`\((\.L_x_\d+)\)", line)
        if target and places[target[1]] < i:
            loops.append((places[target[1]], i))
    loops = [loop for loop in loops if any("MMA" in line for line in lines[slice(*loop)])]
    assert loops, "no loop with a product of matrices"
    innermost = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    return [line for begin, end in innermost for line in lines[begin:end] if re.search(r"\b(LDL|STL)\b", line)]
