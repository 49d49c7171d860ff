# `make help` says what there is.
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

.DEFAULT_GOAL := help
.PHONY: help install demo demo-nova demo-nova-clips demo-emoji test test-slow test-gpu lint docs

help:            ## this list
	@echo 'make TARGET [VENV=none: the current environment] [PYTHON=python3.12: another interpreter]'
	@sed -n 's/^\([a-z-]*\):.*## */  \1	/p' Makefile | expand -t 20

install: $(STAMP)    ## set up .venv with everything that training, drawing and testing need (minutes, 6 GB)

demo: $(STAMP)       ## train on scikit-learn's digits, draw them, read them; SEED=2 for another run
	$(RUN) examples/digits/demo.py --seed $(SEED)

demo-nova: $(STAMP)  ## the same by NOVA, in 1, 2, 4 and 8 sets of tokens
	$(RUN) examples/nova/demo.py --seed $(SEED)

demo-nova-clips: $(STAMP)  ## clips of two digits that move as they are told
	$(RUN) examples/nova/demo.py --clips --seed $(SEED)

demo-emoji: $(STAMP) ## the same with the colour emoji of the system's font; SEED=2 for another run
	$(RUN) examples/emoji/demo.py --seed $(SEED)

test: $(STAMP)       ## every fast test
	$(PYTEST) -n 2

test-slow: $(STAMP)  ## published sizes and long runs; writes the figures of docs/reliability.md
	$(PYTEST) -m '(slow or figure) and not gpu' --record

test-gpu: $(STAMP)   ## what needs CUDA
	$(PYTEST) -m gpu

lint: $(STAMP)       ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(STAMP)       ## write docs/components.md from the declarations
	$(RUN) tools/make_docs.py

# torch and torchvision in one command, or pip may choose builds that do not load together
$(STAMP): setup.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed; this is " + sys.version.split()[0] + ": make PYTHON=...") if sys.version_info < (3, 10) else 0'
	$(if $(filter none,$(VENV)),,test -x $(RUN) || $(PYTHON) -m venv $(VENV))
	$(RUN) -m pip install -c requirements/constraints.txt torch torchvision -e '.[all]'
	@mkdir -p $(@D) && touch $@
