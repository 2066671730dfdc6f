"""Which end of the supported range of transformers the tests run on."""

from importlib.metadata import version

from packaging.version import Version

LOWEST = Version(version("transformers")) < Version("5.21")
"""The lower one. From 5.21 on transformers has another mixer forward, whose scan is ten times as fast on a CPU."""
