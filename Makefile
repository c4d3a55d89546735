# Everything runs in .venv, which is made on first use. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One test file at a time on each of two processes. One compute thread each: the tests' models are tiny, and threads
# that wait for each other while they spin would take the cores from the other process.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
SOURCES := src tests examples benchmarks docs setup.py

.PHONY: bench demo study study-generators docs screenshots test test-slow quality style clean

# The stamp is remade when the requirements change; an interrupted installation leaves none and is repeated.
$(VENV)/installed: setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: apt-get install python3 (3.11 or newer)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11: install a newer one and pass it as PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null \
		|| { echo "error: no C++ compiler $${CXX:-g++}, which torch.compile needs: apt-get install g++"; exit 1; }
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV), which takes some minutes the first time"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Trains a tokenizer and a generator on real images, then samples from the saved pipeline: see examples/demo.py.
demo: $(VENV)/installed
	$(BIN)/python examples/demo.py --output_dir outputs/demo

# Trains SiT, LightningDiT and USiT on the demonstration's latents and compares ways to guide them: about half an hour.
study-generators: $(VENV)/installed
	$(BIN)/python -m benchmarks.study_generators

# The paper's comparison of latent spaces, with docs/study.md as the result: cells that have a record are not run again.
study: $(VENV)/installed
	$(BIN)/python examples/study_latents.py

# The speed of everything on this machine, into benchmarks/results/suite.md: hours on 2 CPU cores.
# A part of it: .venv/bin/python -m benchmarks --groups tokenizer generators
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# The pages of docs/ with the reference made from the docstrings; a link that leads nowhere is an error.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "The documentation is in build/docs/index.html"

# Pictures of the page for docs/images, with the pipeline of `make demo` and Debian's chromium.
screenshots: $(VENV)/installed
	@test -e outputs/demo/pipeline/model_index.json || { echo "error: no outputs/demo/pipeline: run make demo first"; exit 1; }
	$(BIN)/python -m tests.page.screenshots

test: $(VENV)/installed
	$(PYTEST)

test-slow: $(VENV)/installed
	@$(BIN)/python -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "error: no Python.h, which torch.compile needs: apt-get install python3-dev"; exit 1; }
	@command -v "$${CHROMIUM:-chromium}" >/dev/null \
		|| echo "note: no chromium, so that the page is not tested in a browser: apt-get install chromium"
	$(PYTEST) -m slow

quality: $(VENV)/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(SOURCES) README.md CHANGELOG.md Makefile

style: $(VENV)/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache
