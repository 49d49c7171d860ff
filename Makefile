# make demo     set up, train on the digits, draw them        make demo SEED=2
# make test     set up, run every fast test                   make test VENV=none    in the current environment
PYTHON ?= python3
VENV ?= .venv
SEED ?= 1

ifeq ($(VENV),none)
RUN := $(PYTHON)
STAMP := build/installed-$(shell $(PYTHON) -c 'import sys, zlib; print(zlib.crc32(sys.prefix.encode()))')
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
endif
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest

.PHONY: demo test test-slow test-gpu lint docs

demo: $(STAMP)
	$(RUN) examples/digits/demo.py --seed $(SEED)

test: $(STAMP)
	$(PYTEST) -n 2

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-gpu: $(STAMP)
	$(PYTEST) -m gpu

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(STAMP)
	$(RUN) tools/make_docs.py

# torch and torchvision in one command, or pip may choose builds that do not load together
$(STAMP): setup.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed; this is " + sys.version.split()[0] + ": make PYTHON=...") if sys.version_info < (3, 10) else 0'
	$(if $(filter none,$(VENV)),,test -x $(RUN) || $(PYTHON) -m venv $(VENV))
	$(RUN) -m pip install -c requirements/constraints.txt torch torchvision -e '.[all]'
	@mkdir -p $(@D) && touch $@
