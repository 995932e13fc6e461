# Needs python3 (3.11+), pip and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FILE ?=
SEEDS ?= 1000
JOBS ?= 2
HOURS ?= 1
SECONDS ?= 60
SEED ?=

.PHONY: setup demo test lint simulate swarm chaos chaos-nightly chaos-long revocation live bench bench-full clean

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Trimaran needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.installed

demo: setup
	@$(BIN)/trimaran demo $(if $(FILE),--file "$(FILE)")

test: setup
	$(BIN)/python -m pytest -n $(JOBS)

# Simulated swarms, the long ones too (a flash crowd of 500, more seeds, an outage of an hour): some minutes.
swarm: setup
	TRIMARAN_SWARM=long $(BIN)/python -m pytest tests/peer/test_swarm.py

# The cluster under simulated faults: SEEDS of them, or one again with SEED=n (SECONDS of virtual time each).
simulate: setup
	$(BIN)/python -m chaos_tests.simulation --seconds $(SECONDS) $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The programs to compare with, as far as this machine has or may install them; each is skipped with a reason.
.venv-bench/.installed: setup
	@$(PYTHON) -m venv .venv-bench && (.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check libtorrent || true)
	@touch $@

bench: .venv-bench/.installed
	$(BIN)/python -m benchmarks.swarm
	$(BIN)/python -m benchmarks.consensus --rounds 2 --trials 5

bench-full: .venv-bench/.installed
	$(BIN)/python -m benchmarks.swarm --full
	$(BIN)/python -m benchmarks.sparse
	$(BIN)/python -m benchmarks.consensus
	$(BIN)/python -m benchmarks.million

chaos: setup
	$(BIN)/python -m chaos_tests.run smoke $(if $(SEED),--seed $(SEED))

chaos-nightly: setup
	$(BIN)/python -m chaos_tests.run nightly $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m chaos_tests.kill_a_node
	$(BIN)/python -m chaos_tests.run canary

chaos-long: setup
	$(BIN)/python -m chaos_tests.run long --seconds $$(($(HOURS) * 3600)) $(if $(SEED),--seed $(SEED))

# From the acknowledgement of a removal to the last byte served: 50 kicks and other withdrawals, then a blackout.
revocation: setup
	$(BIN)/python -m chaos_tests.revocation --keep revocation

# Seeders of 2, 8 and 32 MB/s, one that falls, one that joins, one that goes; namespaces where the user is root.
live: setup
	$(BIN)/python -m chaos_tests.live --keep live

clean:
	rm -rf $(VENV) .venv-bench .pytest_cache .mypy_cache .ruff_cache build dist
