# Two commands to know: `make demo` and `make test`. Each makes .venv first if need be.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
READY := .venv/.ready
WORKERS ?= 2
PEERS := litserve mlserver evidently
unexport PYTHONDONTWRITEBYTECODE  # or each of a thousand processes compiles mlnb anew

.PHONY: demo test test-long check notebooks pytest products test-container bench bench-peers wheel clean help

demo: $(READY)  ## the whole path on real flights: pipeline, Bento, service, drift, alerts
	python demo.py

test: check  ## every check and test, except test-long
	$(MAKE) -j 2 notebooks products  # the pipeline leaves a processor idle most of the time
	$(MAKE) pytest

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

check: $(READY)  ## notebooks exported, clean and valid; style; import directions; types
	mlnb check
	ruff check .
	lint-imports --no-cache
	mypy

notebooks: $(READY)  ## the tests inside the notebooks
	MLNB_KERNEL_IDLE_MINUTES=1 nbdev-test --n-workers $(WORKERS)

products: $(READY)  ## the reference pipeline, only what changed
	MLNB_KERNEL_IDLE_MINUTES=1 mlnb run

pytest: $(READY) products  ## tests of processes, sockets and faults
	pytest -n $(WORKERS) -m "not long"

test-long: $(READY) products  ## the slowest tests
	pytest -n $(WORKERS) -m long

test-container: $(READY)  ## build and query a real image without a container engine; takes minutes, needs root
	command -v buildah && command -v mmdebstrap || apt-get install --yes --no-install-recommends buildah mmdebstrap
	python tests/container.py

bench: $(READY)  ## run every benchmark and write benchmarks/README.md
	python benchmarks/run.py

bench-peers: $(PEERS:%=.mlnb/peers/%/.ready)  ## install the peers that need their own environment

.mlnb/peers/%/.ready: benchmarks/peers/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

wheel: $(READY)  ## dist/mlnb-*.whl, templates included
	rm -rf build
	python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove everything that can be rebuilt, except .venv
	rm -rf products build dist .mlnb .mypy_cache .pytest_cache .ruff_cache *.egg-info
