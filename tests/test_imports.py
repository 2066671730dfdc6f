"""Imports point one way: fastmamba -> hf -> mixer -> ops -> kernels, reference, configs."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

import fastmamba

PACKAGE = pathlib.Path(fastmamba.__file__).parent
ROOT = PACKAGE.parent

# Module imported in a fresh process -> what must not come in with it. The first one comes before torch.
NOT_IMPORTED = {
    "fastmamba": ("torch", "triton", "transformers", "numpy", "fastmamba.hf", "fastmamba.ops"),
    "fastmamba.mixer": ("triton", "transformers", "fastmamba.hf", "fastmamba.kernels"),
    "fastmamba.ops": ("triton", "transformers", "fastmamba.hf", "fastmamba.mixer", "fastmamba.kernels"),
    "fastmamba.reference.ssd": ("triton", "transformers", "fastmamba.hf", "fastmamba.mixer", "fastmamba.ops"),
    "fastmamba.hf.patch": ("triton", "transformers", "fastmamba.kernels"),
    "fastmamba.hf.compat": ("fastmamba.kernels",),
}

# Room -> the rooms that it may import from.
MAY_IMPORT = {
    "__init__": {"hf"},
    "hf": {"hf", "mixer", "modules", "memory", "step", "ops"},
    "mixer": {"modules", "step", "ops"},
    "modules": set(),
    "memory": set(),
    "step": {"mixer", "modules", "ops"},  # of the mixer, types alone
    "ops": {"ops", "kernels", "reference", "configs"},
    "kernels": {"kernels", "configs", "ssd_plan", "memory"},
    "reference": {"reference"},
    "configs": {"tuned", "ssd_plan"},
    "tuned": set(),
    "ssd_plan": set(),
    "lm_eval": {"hf"},  # a command beside the library: nothing imports it
}


# Each comes into a process of its own, a copy of one that has no more than torch, which itself may bring triton in.
_PROGRAM = f"""
import os, sys
def come_in(name, unwanted):
    child = os.fork()
    if child == 0:
        before = set(sys.modules)
        __import__(name)
        found = [m for m in unwanted if m in sys.modules and m not in before]
        print(name, *found, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
for name, unwanted in {NOT_IMPORTED!r}.items():
    come_in(name, unwanted)
    import torch
"""


@pytest.fixture(scope="module")
def came_in() -> dict[str, list[str]]:
    """What each module brought in of that which it must not."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, timeout=300, cwd=ROOT, stdout=subprocess.PIPE)
    return {name: found for name, *found in map(str.split, done.stdout.decode().splitlines())}


@pytest.mark.parametrize("name", list(NOT_IMPORTED))
def test_fresh_import(name, came_in):
    assert came_in[name] == []


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join([*(package[: -node.level] if node.level else ()), *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES)
def test_directions(source):
    room = source.split("/")[0].removesuffix(".py")
    imports = _imports(PACKAGE / source)
    assert not {name for name in imports if name.split(".")[0] in ("evals", "tests", "examples")}
    rooms = {name.split(".")[1] for name in imports if name.startswith("fastmamba.")}
    assert "testing" not in rooms
    if room in MAY_IMPORT:
        assert rooms <= MAY_IMPORT[room]
    for package, allowed in (("transformers", {"hf"}), ("triton", {"kernels"}), ("accelerate", set()), ("peft", set())):
        if any(name.split(".")[0] == package for name in imports):
            assert room in allowed, f"{source} imports {package}"


def test_names():
    for name in fastmamba.__all__:
        assert getattr(fastmamba, name) is not None
    assert set(fastmamba.__all__) == set(dir(fastmamba))
    with pytest.raises(AttributeError, match="'fastmamba' has no attribute 'spam'"):
        fastmamba.spam  # noqa: B018
