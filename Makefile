# Everything from a fresh clone: `make demo`, `make test`. A machine needs Python >= 3.10 (with venv and headers), a
# C++17 compiler and make; cmake, ninja and all else come into .venv by pip. `make help` lists the targets.
#
#   PYTHON=python3.12   the interpreter that .venv is made from
#   VENV=.venv          where the environment stands
#   TORCH='torch==2.13.0'  what parity tests install; empty: leave torch out, those tests skip with a reason.
#                       On Linux x86-64 a plain index gives a CUDA build of some GB: put a CPU wheel at hand
#                       (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), or say TORCH=
#   RAY='ray[data]==2.60.*'  what the tests on a cluster install (75 MB, 500 MB installed); empty: leave it out, they skip
#   PYTEST_ARGS='-x -k score'  more words for pytest, which then runs in one process and shows prints with -s
#   WORKERS=2           processes that share the test files; each holds up to 1.5 GB
#   QAP_UPSTREAM_DIR, QAP_UPSTREAM_SDIST, QAP_CACHE  see tools/build/fetch_upstream.py

SHELL       := /bin/sh
PYTHON      ?= python3
VENV        ?= .venv
# make's own defaults (g++) are no choice of the user: take what CMake takes
ifeq ($(origin CXX),default)
CXX         := c++
endif
ifeq ($(origin CC),default)
CC          := cc
endif
TORCH       ?= torch==2.13.0
RAY         ?= ray[data]==2.60.*
PYTEST_ARGS ?=
WORKERS     ?= $(if $(PYTEST_ARGS),0,2)
PROMPT      := What is in row 2, column 4?

BIN     := $(VENV)/bin
PY      := $(BIN)/python
PIP     := $(PY) -m pip --disable-pip-version-check
S       := $(VENV)/.stamp
# The build folder outlives an install, so that a second one compiles only what changed.
BUILD   := build/make

# What an install depends on: our sources (a new file too, for `find` runs each time), not caches or results.
SOURCES := CMakeLists.txt pyproject.toml $(shell find native python $(addprefix tools/build/,fetch_upstream.py upstream_patches.py \
             ggml_compiler.py) -type f -not -path '*/__pycache__/*' -not -path '*_cache/*' 2>/dev/null)
NATIVE  := $(shell find native \( -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.inc' \) 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help check venv install extras programs demo test bench lint docs sanitize fuzz format clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

check: ## is this machine equipped? one line with the cure where it is not
	@command -v $(PYTHON) >/dev/null 2>&1 || \
	  { echo "make: expected Python >= 3.10, found no '$(PYTHON)'; install python3 or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: expected Python >= 3.10, got $$($(PYTHON) -V 2>&1); say make PYTHON=python3.12 for example" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: expected Python's venv module, found none; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "make: expected Python.h of $(PYTHON), found none; on Debian: apt-get install python3-dev" >&2; exit 1; }
	@echo 'int main() { return 0; }' | $(CXX) -std=c++17 -x c++ -fsyntax-only - >/dev/null 2>&1 || \
	  { echo "make: expected a C++17 compiler, '$(CXX)' gives none; Debian: apt-get install g++, macOS: xcode-select --install" >&2; exit 1; }
	@command -v git >/dev/null 2>&1 || command -v patch >/dev/null 2>&1 || \
	  { echo "make: expected git or patch, found neither; on Debian: apt-get install patch" >&2; exit 1; }

$(S)-venv:
	@$(MAKE) --no-print-directory check
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip || echo "make: pip stays at $$($(PIP) --version)" >&2
	@touch $@

venv: $(S)-venv ## make the virtual environment

# Build and run-time requirements first, then our own package without build isolation: llama-cpp-python, which compiles
# for minutes, is built once, and what we link against is what we run with.
$(S)-needs: $(S)-venv pyproject.toml tools/build/requirements.py
	@echo "make: installing requirements (llama-cpp-python compiles for some minutes the first time)"
	$(PY) tools/build/requirements.py build run > $(VENV)/needs.txt
	$(PIP) install --quiet -r $(VENV)/needs.txt
	@touch $@

INSTALL = $(PIP) install --no-build-isolation --no-deps --force-reinstall --config-settings build-dir=$(BUILD)

# llama.cpp's programs take three minutes more; once `make programs` has built them, every install keeps them.
PROGRAMS := $(if $(wildcard $(S)-programs),ON,OFF)
LINK_PROGRAMS = ln -sf "$$(cd / && '$(abspath $(PY))' -c 'import qap_gguf; print(qap_gguf.__path__[0])')"/bin/llama-* $(BIN)/

$(S)-install: $(S)-needs $(SOURCES)
	$(INSTALL) --config-settings cmake.define.QAP_WERROR=OFF --config-settings cmake.define.QAP_PROGRAMS=$(PROGRAMS) .
	@touch $@

install: $(S)-install ## install qap_gguf into the environment

# The same install with our warnings as errors; made by lint, good for the tests too.
$(S)-strict: $(S)-needs $(SOURCES)
	$(INSTALL) --config-settings cmake.define.QAP_WERROR=ON --config-settings cmake.define.QAP_PROGRAMS=$(PROGRAMS) .
	@if [ $(PROGRAMS) = ON ]; then $(LINK_PROGRAMS) && touch $(S)-programs; fi
	@touch $(S)-install $@

# llama.cpp's own programs beside the package (native/programs): three minutes of compiling on two cores.
$(S)-programs: $(S)-needs $(SOURCES)
	$(INSTALL) --config-settings cmake.define.QAP_PROGRAMS=ON .
	@$(LINK_PROGRAMS)
	@touch $(S)-install $@

programs: $(S)-programs ## build llama-server and llama-mtmd-cli with pruning in them; serve needs it
$(S)-extras: $(S)-needs
	$(PY) tools/build/requirements.py plot hub serve > $(VENV)/extras.txt
	$(PIP) install --quiet -r $(VENV)/extras.txt
	@touch $@

extras: $(S)-install $(S)-extras ## what serve (besides programs), --hf and pictures of scores need: starlette, uvicorn, huggingface_hub, matplotlib

demo: $(S)-install ## ask the packaged model about the packaged picture
	@echo '$$ $(BIN)/qap-gguf run -p "$(PROMPT)"'
	@$(BIN)/qap-gguf run -p "$(PROMPT)"

$(S)-test: $(S)-needs
	$(PY) tools/build/requirements.py test --without torch > $(VENV)/test.txt
	$(PIP) install --quiet -r $(VENV)/test.txt
	@touch $@

# A step of its own, for it may fail: without torch the parity tests skip and say so. Tried again at the next run.
$(S)-torch: $(S)-test
	@if [ -z '$(TORCH)' ] || $(PIP) install '$(TORCH)'; then touch $@; \
	  else echo "make: no '$(TORCH)' to be had here; the tests that need it will skip" >&2; fi

# As with torch: there is no wheel of ray for every system, and its test skips then. RAY= leaves it out.
$(S)-ray: $(S)-test
	@if [ -z '$(RAY)' ] || $(PIP) install --quiet '$(RAY)' aiohttp; then touch $@; \
	  else echo "make: no '$(RAY)' to be had here; its tests will skip" >&2; fi

# Threads that wait do not spin: two workers with two threads each would stand in each other's way.
test: $(S)-install $(S)-test $(S)-torch $(S)-ray ## run all tests
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

bench: $(S)-install ## time scores and selection against a CLIP-L/336-shaped encoder (about 5 minutes)
	$(PY) benchmarks/score_select.py

$(S)-dev: $(S)-test
	$(PY) tools/build/requirements.py dev --without torch > $(VENV)/dev.txt
	$(PIP) install --quiet -r $(VENV)/dev.txt
	@touch $@

lint: $(S)-dev $(S)-strict ## ruff, mypy, clang-format, warnings as errors, house rules, patches
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(CC) -std=c99 -pedantic -Wall -Wextra -Werror -fsyntax-only -x c native/include/qap.h
	$(PY) tools/build/check_tree.py
	$(PY) tools/build/fetch_upstream.py --verify

$(S)-docs: $(S)-needs
	$(PY) tools/build/requirements.py docs > $(VENV)/docs.txt
	$(PIP) install --quiet -r $(VENV)/docs.txt
	@touch $@

# Warnings are errors: links and anchors to nothing, docstrings that griffe cannot read, pages that the menu leaves out.
docs: $(S)-install $(S)-docs ## the documentation as a site, build/site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "make: build/site/index.html"

# Its own build folders; needs the installed ggml, not our package.
sanitize: $(S)-needs ## our C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	$(PY) tools/build/sanitize.py

fuzz: $(S)-install ## ten minutes of coverage-guided fuzzing; needs clang, and atheris for the guards in Python
	$(PY) tools/fuzz/coverage_guided.py --seconds 600

format: $(S)-dev ## rewrite our Python and C++ in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean: ## remove the environment, builds and caches in this folder
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find python tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
