# What a person does with this repository. `make` alone lists it.
# Works with GNU make 3.81 (macOS) and later. Variables: KEEP=1 PYTHON=… TORCH_INDEX=… TEST_PROCESSES=… PYTEST_ARGS=… FAULTS_ARGS=… SOAK_ARGS=… FUZZ_ARGS=… BENCH_ARGS=…

.DEFAULT_GOAL := help
.PHONY: help demo up test test-slow test-postgres test-deepspeed test-faults soak fuzz bench bench-gpu bench-api check audit lock clean \
	check-lint check-format check-types check-imports check-migrations check-documents
.SUFFIXES:

BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
SET_UP := pyproject.toml setup.py client/pyproject.toml $(wildcard requirements/*.lock) .ci/set-up

# Processes that share out the files of tests, in their order; 0 for none beside pytest's own. Each brings its own servers.
TEST_PROCESSES ?= 2
SHARED_OUT = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Threads that spin while they wait make everything else on the machine slow.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY
export KEEP PYTHON TORCH_INDEX

help:
	@echo "make demo        train three adapters at once and show the result (KEEP=1 leaves the service running)"
	@echo "make up          start Lorry on this machine: api, dashboard and one worker, until Ctrl-C"
	@echo "make test        run the tests; brings its own Redis, PostgreSQL and Chromium"
	@echo "make test-slow   run the tests that take minutes; brings its own real language model, 100 MB"
	@echo "make test-postgres    run the tests of api, catalog and clients with PostgreSQL in SQLite's place"
	@echo "make test-deepspeed   run the tests of bases that DeepSpeed divides; brings it along, and builds a part of it"
	@echo "make test-faults      break a real service in every way that this machine allows, on SQLite and PostgreSQL: 50 minutes"
	@echo "make soak        300 jobs on four workers: a noisy neighbor, then a random fault every few seconds; 45 minutes"
	@echo "make fuzz        ask the API tens of thousands of odd questions, on SQLite and PostgreSQL: half an hour or more"
	@echo "make bench       measure Lorry against PEFT, Trainer and TRL on this machine: half an hour, real language model"
	@echo "make bench-gpu   measure it on a CUDA GPU, bases of 1B and 8B with random weights: memory, matrix rate, PEFT"
	@echo "make bench-api   measure the api and its database: creations, reads, 10,000 listeners, a million jobs; 25 minutes"
	@echo "make check       lint, format, types, import rules, migrations, documents"
	@echo "make audit       check the locked packages for known vulnerabilities (pip-audit)"
	@echo "make lock        update requirements/*.lock to the newest releases"
	@echo "make clean       remove .venv and all caches"

demo: .venv/.installed-demo
	$(BIN)/python examples/demo.py

up: .venv/.installed-demo
	$(BIN)/lorry up

test: .venv/.installed
	$(PYTEST) -m "not slow" $(SHARED_OUT) $(PYTEST_ARGS)

test-slow: .venv/.installed
	$(PYTEST) -m slow $(PYTEST_ARGS)

test-postgres: .venv/.installed
	LORRY_TEST_DATABASE=postgresql $(PYTEST) -m "not slow" $(SHARED_OUT) $(PYTEST_ARGS) \
		tests/api tests/catalog tests/lorry tests/system/test_openai_client.py

# Beside .venv: where DeepSpeed is installed, transformers imports it each time.
DEEPSPEED := $(CURDIR)/.venv/deepspeed

test-deepspeed: $(DEEPSPEED)/.installed
	PYTHONPATH=$(DEEPSPEED) PATH=$(DEEPSPEED)/bin:$$PATH $(PYTEST) -k zero3 $(PYTEST_ARGS) tests/lora_core/distributed/test_ranks.py

$(DEEPSPEED)/.installed: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(DEEPSPEED) "deepspeed>=0.18" "ninja>=1.11" \
		einops hjson msgpack py-cpuinfo
	touch $@

test-faults: .venv/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m qa.chaos $(FAULTS_ARGS)

soak: .venv/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m qa.chaos.soak --out benchmarks/results $(SOAK_ARGS)

fuzz: .venv/.installed
	$(BIN)/python -m qa.fuzz $(FUZZ_ARGS)

bench: .venv/.installed
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-gpu: .venv/.installed
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

bench-api: .venv/.installed
	$(BIN)/python -m benchmarks.api $(BENCH_ARGS)

# `make -k check` goes on after a part that failed.
check: check-lint check-format check-types check-imports check-migrations check-documents

check-lint: .venv/.installed
	$(BIN)/ruff check .

check-format: .venv/.installed
	$(BIN)/ruff format --check .

check-types: .venv/.installed
	$(BIN)/pyright

check-imports: .venv/.installed
	$(BIN)/lint-imports

check-migrations: .venv/.installed
	$(BIN)/python .ci/check_migrations.py

check-documents: .venv/.installed
	$(PYTEST) -q tests/architecture

audit: .venv/.installed
	.ci/audit

lock:
	.ci/lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info client/build client/dist client/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(SET_UP)
	.ci/set-up dev

.venv/.installed-demo: $(SET_UP)
	.ci/set-up demo
