# Commands for development. `make` alone lists them.
# Works with GNU make 3.81 (macOS) and later. Variables: KEEP=1 PYTHON=… TORCH_INDEX=… TEST_PROCESSES=… PYTEST_ARGS=… FAULTS_ARGS=… SOAK_ARGS=… FUZZ_ARGS=… BENCH_ARGS=… KIT_ARGS=… REVISION=…

.DEFAULT_GOAL := help
.PHONY: help demo up dist test test-slow test-postgres test-compose test-deepspeed test-faults soak fuzz bench gpu-kit bench-api check audit lock size clean \
	check-lint check-format check-types check-imports check-migrations check-words check-documents
.SUFFIXES:

BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
SET_UP := pyproject.toml setup.py client/pyproject.toml $(wildcard requirements/*.lock) .ci/set-up

# Number of processes that run the tests, by file and in order; 0: only pytest's own process. Each starts its own servers.
TEST_PROCESSES ?= 2
SHARED_OUT = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Waiting threads must not spin: that would slow down everything else on the machine.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY
export KEEP PYTHON TORCH_INDEX

help:
	@echo "make demo        train three adapters at once and show the results (KEEP=1 leaves the service running)"
	@echo "make up          start Lorry on this machine: API server, dashboard and one worker, until Ctrl-C"
	@echo "make docs        write the files that are generated from the code, and build the documentation site in site/"
	@echo "make test        run the fast tests; starts its own Redis, PostgreSQL and Chromium"
	@echo "make test-slow   run the tests that take minutes; downloads a real language model, 100 MB"
	@echo "make test-postgres    run the tests of API server, catalog and clients on PostgreSQL instead of SQLite"
	@echo "make test-compose     follow the guides' steps with Docker Compose on a Docker engine; needs root and mmdebstrap; 15 minutes"
	@echo "make test-deepspeed   run the tests of DeepSpeed ZeRO-3 sharding; installs DeepSpeed and compiles a part of it"
	@echo "make test-faults      inject 43 faults into a real service with SQLite or PostgreSQL; half an hour"
	@echo "make soak        run the chaos soak test: 300 jobs on four workers, a random fault every few seconds; 45 minutes"
	@echo "make fuzz        fuzz the API with tens of thousands of requests, on SQLite and PostgreSQL; 30 minutes or more"
	@echo "make bench       compare Lorry with PEFT, Trainer and TRL on this machine, with a real language model; 20 minutes"
	@echo "make gpu-kit     test and measure the engine on a CUDA GPU of 80 GB in 8 minutes, with every result on disk at once"
	@echo "make bench-api   benchmark the API server and its database: jobs, reads, a million stored jobs; 15 minutes"
	@echo "make check       lint, format, types, import rules, migrations, words, documents"
	@echo "make dist        build the wheels and source distributions of lorry and lorry-server in dist/"
	@echo "make audit       check the locked packages for known vulnerabilities (pip-audit)"
	@echo "make lock        update requirements/*.lock to the newest releases"
	@echo "make size        count the lines of Python by package"
	@echo "make clean       remove .venv and all caches"

demo: .venv/.installed-demo
	$(BIN)/python examples/demo.py

up: .venv/.installed-demo
	$(BIN)/lorry up

size:
	python3 -m tools.size $(REVISION)

.PHONY: docs
docs: .venv/.installed
	$(BIN)/python -m tools.generate_docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: .venv/.installed
	$(PYTEST) -m "not slow and not docker and not gpu" $(SHARED_OUT) $(PYTEST_ARGS)

test-slow: .venv/.installed
	$(PYTEST) -m slow --timeout 1800 $(SHARED_OUT) $(PYTEST_ARGS)

test-postgres: .venv/.installed
	LORRY_TEST_DATABASE=postgresql $(PYTEST) -m "not slow and not gpu" $(SHARED_OUT) $(PYTEST_ARGS) \
		tests/api tests/catalog tests/lorry tests/system/test_openai_client.py

test-compose: .venv/.installed
	$(PYTEST) -m docker --timeout 5400 -s $(PYTEST_ARGS) tests/compose

# DeepSpeed has a folder of its own next to .venv: wherever it is installed, transformers imports it each time.
DEEPSPEED := $(CURDIR)/.venv/deepspeed

test-deepspeed: $(DEEPSPEED)/.installed
	PYTHONPATH=$(DEEPSPEED) PATH=$(DEEPSPEED)/bin:$$PATH $(PYTEST) -k zero3 $(PYTEST_ARGS) \
		tests/lora_core/fake_cuda/test_ticks.py tests/lora_core/distributed/test_ranks.py

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

gpu-kit: .venv/.installed
	$(BIN)/python -m benchmarks.gpu_kit --out .cache/gpu-kit $(KIT_ARGS)

bench-api: .venv/.installed
	$(BIN)/python -m benchmarks.api $(BENCH_ARGS)

# `make -k check` continues after a failing part.
check: check-lint check-format check-types check-imports check-migrations check-words check-documents

check-lint: .venv/.installed
	$(BIN)/ruff check .

check-format: .venv/.installed
	$(BIN)/ruff format --check .

# Near Node's default limit of 4 GB, pyright discards what it has inferred, and takes several times as long.
check-types: .venv/.installed
	NODE_OPTIONS=--max-old-space-size=8192 $(BIN)/pyright

check-imports: .venv/.installed
	$(BIN)/lint-imports

check-migrations: .venv/.installed
	$(BIN)/python .ci/check_migrations.py

# The sentences of generated pages come from messages and descriptions, which have limits of their own.
check-words: .venv/.installed
	$(BIN)/python tools/check_words.py
	$(BIN)/python tools/sentence_lengths.py README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md $$(find docs -name '*.md')

check-documents: .venv/.installed
	$(BIN)/python -m tools.generate_docs --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	$(PYTEST) -q tests/architecture

dist: .venv/.installed
	for project in client .; do $(BIN)/python -m build --no-isolation --outdir dist $$project || exit; done

audit: .venv/.installed
	.ci/audit

lock:
	.ci/lock

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist site *.egg-info client/build client/dist client/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(SET_UP)
	.ci/set-up dev

.venv/.installed-demo: $(SET_UP)
	.ci/set-up demo
