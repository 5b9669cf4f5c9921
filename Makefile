# Everything happens in .venv in this folder. On a fresh machine Python 3.11 (or 3.12), git and make are enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= quickstart-out
JOBS   ?= 2
PYTEST_ARGS ?=

.PHONY: install install-dev system-packages quickstart test test-slow test-webdataset-1 lint format bench clean

install: $(VENV)/.installed            ## Pairmill and what it needs to run, S3 included

install-dev: $(VENV)/open-clip/.installed   ## the same, with what the tests and linters need

# torch comes first and from the constraints file, so that nothing pulls another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[s3]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[s3,dev]'
	@touch $@

quickstart: install                    ## the whole job on the sample web: corpus, run, report in OUT=DIR
	$(BIN)/pairmill quickstart --out $(OUT)

# A browser for the report's test and a Prometheus for the monitoring's. Where they cannot be installed
# (no root, no apt) those tests are skipped and say so.
system-packages:
	@infra/install-debian-packages.sh

test: install-dev system-packages      ## the test suite, but for the long ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

test-slow: install-dev                 ## the long ones
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m slow $(PYTEST_ARGS)

# Packages that the tests and benchmarks read alone, each in a folder of its own: img2dataset holds webdataset below 0.3
# in the environment, Streaming would bring the clients of every cloud, and open_clip torchvision.
$(VENV)/webdataset-1/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(@D) webdataset==1.0.2
	@touch $@

$(VENV)/open-clip/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(@D) open_clip_torch==3.3.0
	@touch $@

$(VENV)/mosaicml-streaming/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(@D) mosaicml-streaming==0.13.0
	@touch $@

$(VENV)/imagededup/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(@D) imagededup==0.3.3.post2
	@touch $@

test-webdataset-1: install-dev $(VENV)/webdataset-1/.installed   ## the stream's tests under webdataset 1.x
	PYTHONPATH=$(VENV)/webdataset-1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests/shards \
		tests/train/test_batches.py $(PYTEST_ARGS)

lint: install-dev                      ## style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

BENCH_PARTS := $(addprefix benchmarks/,photographs.py peers.py tiny_shards.py)

bench: install-dev $(VENV)/webdataset-1/.installed $(VENV)/mosaicml-streaming/.installed $(VENV)/imagededup/.installed
bench:                                 ## every benchmark that needs no accelerator; results on standard output
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[s3,dev,bench]'
	for script in $(filter-out $(BENCH_PARTS),$(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
