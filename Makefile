# Each of these makes what it needs under .venv from a bare Python, and costs nothing to run again:
#   make test    the tests, on the newest and, where it matters, on the lowest supported transformers
#   make check   format, lint, types
#   make demo    time prefill, original against patched: table, plot, JSON
#   make quality lm-eval and next-token distributions, original against patched: table, plot, JSON
# Variables: PYTHON (>= 3.10), TORCH (what to give pip for torch), ARGS (passed to pytest, the demo or quality).

PYTHON ?= python3
# torch goes in first and pinned: resolved later, a looser requirement may fetch another build of several gigabytes.
TORCH ?= torch==2.13.0
LOWEST_TRANSFORMERS ?= 5.15.0
LOWEST_TRITON ?= 3.6.0
ARGS ?=

VENV := .venv
LOWEST := $(VENV)/transformers-$(LOWEST_TRANSFORMERS)
# Bytecode comes with the first import of what is imported: made for all that is installed, it takes a minute and more.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(VENV)/bin/python $(INSTALL)
# Tests build their own small models, so nothing is to be fetched. Bytecode is kept whatever the environment says: tests
# start many processes.
TESTING := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
TRITON := import torch, triton; print("" if torch.version.cuda else "triton==$(LOWEST_TRITON) numpy<2.4")

.DELETE_ON_ERROR:
.PHONY: help test test-newest test-lowest check demo quality clean

help:
	@sed -n '2,7s/^# \{0,1\}//p' Makefile

# What knows no transformers, or is a script's: of operations, tests/conftest.py leaves what the lowest triton may change.
UNCHANGED := evals examples reference test_configs.py test_imports.py test_modules.py

# Two workers of one thread each are faster than one of two threads. make -j 2 installs the lowest transformers meanwhile.
test: test-newest test-lowest

test-newest: $(VENV)/test.stamp
	$(TESTING) $(VENV)/bin/python -m pytest --numprocesses 2 $(ARGS)

test-lowest: $(LOWEST)/stamp | test-newest
	$(TESTING) $(LOWEST)/bin/python -m pytest --numprocesses 2 $(UNCHANGED:%=--ignore tests/%) $(ARGS)

check: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

demo: $(VENV)/demo.stamp
	$(VENV)/bin/python examples/prefill_timing.py $(ARGS)

quality: $(VENV)/evals.stamp
	$(VENV)/bin/python -m evals.quality $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastmamba needs Python >= 3.10: make PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

# demo, evals, test, dev: the extra of that name in pyproject.toml. Each has those before it in it.
$(VENV)/%.stamp: pyproject.toml $(VENV)/torch.stamp
	$(PIP) --editable '.[$*]'
	@for extra in demo evals test dev; do \
	  [ $(VENV)/$$extra.stamp -nt pyproject.toml ] || touch $(VENV)/$$extra.stamp; [ $$extra != $* ] || break; done
	@touch $@

# Another transformers, .venv/transformers-VERSION: an environment that sees the first one's packages and puts its own
# before them, so that only transformers and what it pins are there twice. Beside the lowest one goes the lowest triton,
# and the numpy that its interpreter knows; a CUDA build of torch keeps the triton that it was built for.
$(VENV)/transformers-%/stamp: $(VENV)/test.stamp
	$(VENV)/bin/python -m venv $(@D)
	@echo "import site; site.addsitedir('$$($(VENV)/bin/python -c '$(PURELIB)')')" \
	  > "$$($(@D)/bin/python -c '$(PURELIB)')/newest.pth"
	$(@D)/bin/python $(INSTALL) 'transformers==$*' \
	  $(if $(filter $*,$(LOWEST_TRANSFORMERS)),$$($(VENV)/bin/python -c '$(TRITON)' 2> /dev/null))
	@touch $@
