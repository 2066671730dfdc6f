"""Triton kernels and their launchers: no validation, no autograd, no dispatch."""
