# make demo   shows the main job on a real ComfyUI
# make demo-ray   two workers against one process, on the CPU
# make test   lint, types, layering, unit, contract and end-to-end tests
#
# Both make an environment in .venv, or use the one that RESIDENCY_VENV names (several clones can share it), and get
# ComfyUI from COMFYUI_PATH or from a pinned source archive.
PYTHON ?= python3
VENV := $(abspath $(or $(RESIDENCY_VENV),.venv))
RUN := $(VENV)/bin/python
export COMFYUI_TREES ?= $(VENV)/comfyui
# Threads of torch's that spin while they wait for each other are very slow where somebody else wants a core too.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-ray test lint types bench setup hooks-table
setup:
	$(PYTHON) tests/support/setup_environment.py "$(VENV)"

demo: setup
	$(RUN) tests/support/demo.py

demo-ray: setup
	$(RUN) tests/support/demo_ray.py

test: setup lint types
	$(RUN) -m pytest -n 2 $(PYTEST_ARGS)

lint: setup
	$(VENV)/bin/ruff check .

# mypy wants a package whose folder has an importable name, and a clone may be called anything.
types: setup
	link=$$(mktemp -d) && ln -s "$(CURDIR)" $$link/residency && cd $$link && \
	$(VENV)/bin/mypy --config-file "$(CURDIR)/pyproject.toml" -p residency; status=$$?; rm -r $$link; exit $$status

bench: setup
	$(RUN) tests/bench/run.py $(BENCH)

# Rewrites the README's table of hooks from the code; a test fails while the two differ.
hooks-table: setup
	$(RUN) tests/support/hooks_table.py
