# Two commands to know: `make demo` and `make test`. Each makes .venv first if need be.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
READY := .venv/.ready
WORKERS ?= 2
PEERS := litserve mlserver evidently

.PHONY: demo test test-long check notebooks pytest products test-container bench bench-peers wheel clean help

demo: $(READY)  ## the whole road on real flights: pipeline, Bento, service, drift
	python demo.py

test: check notebooks products pytest  ## everything that must hold, but the tests of test-long

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml setup.py $(wildcard jupyter/*/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else f"mlnb needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@mkdir -p .venv/etc/jupyter .venv/share/jupyter
	@cp -R jupyter/etc/. .venv/etc/jupyter/
	@cp -R jupyter/share/. .venv/share/jupyter/
	@touch $@

check: $(READY)  ## notebooks exported, clean and valid; style; import directions
	mlnb check
	ruff check .
	lint-imports --no-cache

notebooks: $(READY)  ## the tests inside the notebooks
	MLNB_KERNEL_IDLE_MINUTES=1 nbdev-test --n-workers $(WORKERS)

products: $(READY)  ## the reference pipeline, only what changed
	MLNB_KERNEL_IDLE_MINUTES=1 mlnb run

pytest: $(READY) products  ## everything that crosses a process, a socket or a fault
	pytest -n $(WORKERS) -m "not long"

test-long: $(READY) products  ## the tests that take longest, minutes
	pytest -n $(WORKERS) -m long

test-container: $(READY)  ## a real image, made without a container engine, and asked; minutes, as root
	command -v buildah && command -v mmdebstrap || apt-get install --yes --no-install-recommends buildah mmdebstrap
	python tests/container.py

bench: $(READY)  ## every benchmark, and benchmarks/README.md from its figures
	python benchmarks/run.py

bench-peers: $(PEERS:%=.mlnb/peers/%/.ready)  ## what is compared and has an environment of its own

.mlnb/peers/%/.ready: benchmarks/peers/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

wheel: $(READY)  ## dist/mlnb-*.whl, templates included
	rm -rf build
	python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## all that can be made again, .venv excepted
	rm -rf products build dist .mlnb .pytest_cache .ruff_cache *.egg-info
