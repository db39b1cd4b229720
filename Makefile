# Everything here needs Rust and Python 3.10 or later and nothing else: `make` installs the rest into .venv.

VENV := .venv
BIN := $(VENV)/bin
# The tools are installed again when their list changes.
TOOLS := $(VENV)/.tools
RUST := $(shell find rust -name '*.rs' 2>/dev/null) Cargo.toml Cargo.lock
PYTHON := $(shell find python -name '*.py' -o -name '*.pyi' 2>/dev/null) pyproject.toml
# The one `unsafe` of the router is a hint that touches no memory, so its fuzzing needs no sanitizer, and so no nightly compiler.
FUZZ_SECS := 600
FUZZ_TARGETS := scan stream_usage tree trace_queries
# Built and installed into .venv when a source is newer.
INSTALLED := $(VENV)/.installed

.PHONY: help build install wheel demo test test-rust test-python check format generate bench-memory bench-hot-path bench-overload bench-disconnects bench-truth bench-routing bench-hostile bench-overhead chaos fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

build: ## the program without Python: target/release/sglang-router-rs
	cargo build --release --locked

install: $(INSTALLED) ## the Python package, built from here, into .venv

wheel: $(TOOLS) ## a wheel in dist/ for any Linux with glibc 2.28 or later
	PATH=$(CURDIR)/$(BIN):$$PATH maturin build --release --locked --zig --compatibility manylinux_2_28 --out dist

demo: ## a router, two simulated workers, five requests, and who served them
	./examples/demo.sh

test: test-rust test-python ## all tests

test-rust:
	cargo test --locked

test-python: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED) ## formatting, lints, types, generated files
	cargo fmt --check
	cargo clippy --locked --all-targets --features python -- --deny warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest sglang_router_rs._core
	$(BIN)/python tools/generate.py --check

format: $(TOOLS) ## mend the formatting
	cargo fmt
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(INSTALLED) ## write the files that are derived from the Rust sources
	$(BIN)/python tools/generate.py

bench-memory: ## memory of 100,000 traces and of a million prompts
	cargo bench --locked --bench memory

bench-hot-path: ## what scan, tree, policies and tracker cost, against their bounds; HOT_PATH=tree for some of it
	cargo bench --locked --bench hot_path -- $(HOT_PATH)

bench-overload: $(INSTALLED) ## ten times the load the workers can bear; OVERLOAD="--factor 20 …" for options
	$(BIN)/python tools/overload.py $(OVERLOAD)

bench-disconnects: $(INSTALLED) ## 2,000 clients that leave at random moments; DISCONNECTS="--clients 500 …" for options
	$(BIN)/python tools/disconnects.py $(DISCONNECTS)

bench-truth: $(INSTALLED) ## does the laboratory tell the truth?; TRUTH="--requests 500 …" for options
	$(BIN)/python tools/truth.py $(TRUTH)

bench-routing: $(INSTALLED) ## policies and sglang-router on one trace over HTTP; ROUTING="--trace FILE …"
	$(BIN)/python tools/routing.py $(ROUTING)

bench-hostile: $(INSTALLED) ## clients that mean harm, beside others; HOSTILE="--attacks idle …" for some of them
	PYTHONPATH=tools $(BIN)/python benches/overhead/hostile.py $(HOSTILE)

bench-overhead: $(INSTALLED) build ## what a router costs, beside HAProxy and sglang-router; OVERHEAD="--runs requests …"
	PYTHONPATH=tools $(BIN)/python benches/overhead/overhead.py $(OVERHEAD)

chaos: $(INSTALLED) ## five minutes of load while workers are killed, hang and refuse; CHAOS="--seconds 60 …" for options
	$(BIN)/python tools/chaos.py $(CHAOS)

fuzz: ## each fuzz target for FUZZ_SECS=600 seconds; FUZZ_TARGETS=… for some of them
	@command -v cargo-fuzz > /dev/null || cargo install cargo-fuzz --locked
	cp Cargo.lock fuzz/Cargo.lock
	@for target in $(FUZZ_TARGETS); do \
		echo "fuzz $$target for $(FUZZ_SECS) s; what is found comes to fuzz/artifacts/$$target"; \
		mkdir -p fuzz/corpus/$$target; \
		(cd fuzz && RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none $$target corpus/$$target $$(ls -d seeds/$$target 2> /dev/null) -- \
			-max_total_time=$(FUZZ_SECS) -max_len=4096 $$(ls words/$$target 2> /dev/null | sed 's/^/-dict=/') \
			-print_final_stats=1) || exit 1; \
	done

clean: ## remove what was built
	cargo clean
	rm -rf $(VENV)

$(TOOLS): pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --group dev
	touch $@

$(INSTALLED): $(TOOLS) $(RUST) $(PYTHON)
	rm -rf target/install
	$(BIN)/maturin build --release --locked --out target/install
	$(BIN)/pip install --quiet --force-reinstall --no-deps target/install/*.whl
	$(BIN)/pip install --quiet 'sglang_router_rs[bench]'
	touch $@
