# `make help` lists the targets. Variables, given as `make demo NAME=VALUE` or in the environment:
#   PYTHON              the Python 3.11 to 3.14 that .venv is made from
#   VLLM_TARGET_DEVICE  cpu or cuda; by default cuda where an NVIDIA driver is installed
#   PIP_EXTRA_INDEX_URL must name PyTorch's CPU index for `cpu`, unless pip's configuration does:
#                       upstream requires torch==2.13.0+cpu, which the default index does not have
#   MAX_JOBS            how many compilers run at once
#   WHEELS              which wheels `make wheel` builds and `make test-wheel` tries: cpu, cuda, empty
#   VERSION             the vLLM that `make check-vllm` tries
#   TEST_PROCESSES      how many Python test files run at once, 2 by default; each takes up to 6 GiB
#   TEST_SEED           a number with which the Python tests draw the same data again
#   SECONDS             how long `make fuzz` runs in total, 60 by default
#   FUZZ_SEED           a number with which `make fuzz` tries the same inputs in the same order
PYTHON ?= python3
TEST_PROCESSES ?= 2
SECONDS ?= 60
WHEELS ?= cpu cuda empty
VENV := .venv
RUN := $(VENV)/bin/python
BOOTSTRAP := $(PYTHON) -m build_tools.bootstrap --venv $(VENV)
# Material says in every build that MkDocs 1 is nearing its end.
SITE := NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs
# Each process takes one file at a time, because the tests of a file share fixtures that start vLLM.
# It takes them in the order of their names: the long ones of e2e/ come early, and the short ones at
# the end fill up the time that is left.
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
SEED := $(if $(TEST_SEED),--seed $(TEST_SEED))
CPP_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc')

# Images for containers like to set this variable. Every process that imports vLLM would then compile
# a few thousand modules anew: a refused `vllm serve` takes 17 s with it and 9 s without.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo check test test-cpp test-asan test-tsan test-emulated test-python fuzz \
	lint format docs docs-serve models-table quality wheel test-wheel test-aarch64 verify-upstream \
	check-vllm clean clean-upstream

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: ## make .venv, lay upstream in, build the engine, install (editable)
	@$(BOOTSTRAP)

demo: install ## serve the demo model through the engine and answer one chat request
	@$(RUN) examples/demo.py

check: ## the quick tests that start no vLLM engine, for the loop of editing and running
	@$(RUN) -m build_tools.engine
	@$(RUN) -m build_tools.engine test
	@$(RUN) -m pytest -q -m "not alone and not slow" --ignore tests/e2e \
		-n $(TEST_PROCESSES) --dist worksteal

test: test-cpp test-python ## the whole test suite

test-cpp: ## the engine's C++ tests
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m build_tools.engine test

test-asan: ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m build_tools.engine test asan

test-tsan: ## the C++ tests under ThreadSanitizer
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m build_tools.engine test tsan

test-emulated: ## the C++ tests of every instruction set's kernels, on emulated instructions
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m build_tools.engine test emulated

test-aarch64: ## the C++ tests with the portable kernels on an emulated 64-bit ARM CPU
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m build_tools.engine test aarch64

fuzz: ## made-up inputs for the readers and the engine, for SECONDS; after test-asan
	@$(BOOTSTRAP) --tools test --tools fuzz
	@$(RUN) -m tests.fuzz $(SECONDS)

test-python: ## the Python tests
	@$(BOOTSTRAP) --tools test
	@$(RUN) -m pytest -m alone $(SEED)
	@$(RUN) -m pytest -m "not alone" $(SIDE_BY_SIDE) $(SEED)

lint: ## check format, lint, types, and that the generated documentation is current and builds
	@$(BOOTSTRAP) --tools lint --tools test --tools docs
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	@$(RUN) -m lvllm.settings.variables | cmp - docs/configuration.md \
		|| { echo 'error: docs/configuration.md is not current: run `make docs`' >&2; exit 1; }
	@$(RUN) -m lvllm.patches | cmp - docs/patches.md \
		|| { echo 'error: docs/patches.md is not current: run `make docs`' >&2; exit 1; }
	@$(RUN) -m tests.e2e.results_page --check
	$(SITE) build --strict --quiet

format: ## format all code in place
	@$(BOOTSTRAP) --tools lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

docs: ## regenerate the generated pages and pictures, and build the site into build/site
	@$(BOOTSTRAP) --tools docs
	$(RUN) -m lvllm.settings.variables > docs/configuration.md
	$(RUN) -m docs.chinese_settings
	$(RUN) -m lvllm.patches > docs/patches.md
	$(RUN) -m docs.pictures
	$(RUN) -m benchmarks.plans
	$(RUN) -m benchmarks.recipes
	$(SITE) build --strict

docs-serve: ## show the site on http://127.0.0.1:8001, and build it anew after each change
	@$(BOOTSTRAP) --tools docs
	$(SITE) serve --dev-addr 127.0.0.1:8001

models-table: install ## rerun the tests of whole models and write the tables of docs/models.md
	$(RUN) -m pytest $(SIDE_BY_SIDE) tests/e2e/test_exactness.py tests/e2e/test_formats.py \
		tests/e2e/test_expert_classes.py --record docs/tested.json
	$(RUN) -m tests.e2e.results_page

quality: install ## measure the demo model in every weight format, into docs/quality.md and .zh.md
	$(VENV)/bin/lvllm eval examples/models/tiny-moe --formats all \
		--markdown docs/quality.md --markdown docs/quality.zh.md

wheel: ## build the manylinux wheels WHEELS into dist/
	@$(BOOTSTRAP) --tools wheel
	@$(RUN) -m build_tools.wheel $(WHEELS)

test-wheel: ## install wheels of dist/ in new environments without a compiler, and chat
	@$(RUN) -m build_tools.check_wheel $(filter-out cuda,$(WHEELS))

verify-upstream: ## prove that vllm/ is the pinned upstream, byte for byte
	@$(PYTHON) -m build_tools.verify_upstream

check-vllm: install ## try LvLLM with another vLLM, such as VERSION=0.33.0, in build/check-vllm
	@$(RUN) -m build_tools.check_vllm "$(VERSION)"

clean: ## remove everything built; keep .venv, the fetched wheels and the laid-in tree
	find build -mindepth 1 -maxdepth 1 ! -name upstream -exec rm -rf {} + 2>/dev/null || true
	rm -rf dist lvllm/engine/_engine.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

clean-upstream: ## remove the laid-in vllm/ tree, with any edits in it
	find vllm -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
