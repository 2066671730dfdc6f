"""Which end of the supported range of transformers the tests run on."""

from importlib.metadata import version

import torch
from packaging.version import Version

LOWEST = Version(version("transformers")) < Version("5.21")
"""The lower one. From 5.21 on transformers has another mixer forward, whose scan is ten times as fast on a CPU."""

SECOND = LOWEST and not torch.cuda.is_available()
"""Whether `make test` has run the same tests on the newest one, with the same torch and without a GPU."""
