# Everything a newcomer, a developer and CI run. Each target sets up what it needs; the environment lives in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
# ONNX Runtime would tell its maker about every session (its Privacy.md).
export ORT_DISABLE_TELEMETRY ?= 1

PYTHON ?= python3
BIN := .venv/bin
DEVICES ?= 36
SEED ?= 1
COUNT ?= 200
SOAK_SEEDS ?= 150
MINUTES ?= 1
WORKERS ?= $(shell nproc)
PAIRS ?= *
BENCH_OPTIONS ?=
DEB_OPTIONS ?=
AT_REST_OPTIONS ?=
SWAP_OPTIONS ?=
ACCELERATORS ?= openvino cuda
SUITE ?=
EVALS ?=
SAMPLE ?= 200

# The environment is known by the lock file that it was made from.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "whimbrel: Python 3.11 to 3.13 is needed (try: make PYTHON=python3.12 $@)" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "setting up .venv"; $(PYTHON) -m venv .venv; }
	@$(BIN)/python tools/environment.py locks/$(1).lock
endef

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  %-18s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: ## bring up a broker, a server and 36 devices; ship a good and a bad release of a real model (about two minutes)
	$(call environment,demo)
	$(BIN)/whimbrel-sim run --devices $(DEVICES) --seed $(SEED) --report whimbrel-report.html

.PHONY: demo-llm
demo-llm: ## the same with a language model: SmolLM2-135M under llama.cpp, 4 devices (compiles llama.cpp: some minutes more)
	$(call environment,llm)
	$(BIN)/python -m examples.smollm2.fetch
	[ -f .cache/smollm2/report.json ] || $(BIN)/python -m examples.smollm2.build --model .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf --out .cache/smollm2
	$(BIN)/whimbrel-sim run --llm --models .cache/smollm2 --devices 4 --seed $(SEED) --report whimbrel-llm-report.html

.PHONY: setup
setup: ## make the development environment (compiles llama.cpp once: four to eight minutes)
	$(call environment,dev)

.PHONY: test
test: setup ## run all tests, in WORKERS processes (default: as many as there are processors)
	$(BIN)/python -m examples.smollm2.fetch
	@command -v mosquitto >/dev/null || echo "note: mosquitto is not installed (apt-get install mosquitto): its tests are skipped"
	@ls /usr/lib/postgresql/*/bin/pg_ctl >/dev/null 2>&1 || command -v pg_ctl >/dev/null || echo "note: PostgreSQL is not installed (apt-get install postgresql): its tests are skipped"
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -m alone

.PHONY: lint
lint: setup ## check style, formatting, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: setup ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: kill-test
kill-test: setup ## kill a live agent at COUNT random instants of an update (default 200); IN_PLACE=1: of one that rewrites its only copy
	$(BIN)/python -m tests.kill --count $(COUNT) --seed $(SEED) $(if $(IN_PLACE),--in-place)

.PHONY: key-rotation
key-rotation: setup ## lose, steal and replace keys of a live fleet by the runbook docs/keys.md: 12 devices over mosquitto with certificates (DEVICES=N)
	$(BIN)/python -m tests.key_rotation --devices $(if $(filter file,$(origin DEVICES)),12,$(DEVICES)) --seed $(SEED)

.PHONY: swap-load
swap-load: setup ## ask a device's endpoint 10,000 times while 20 updates swap its model: every answer is compared with what its version answers
	$(BIN)/python -m tests.swap_load --seed $(SEED) $(SWAP_OPTIONS)
	$(BIN)/python -m tests.swap_load --seed $(SEED) --executor
	$(BIN)/python -m tests.swap_load --seed $(SEED) --in-place --count 1000 --swaps 5
	$(BIN)/python -m tests.swap_load --seed $(SEED) --llama --count 150 --swaps 6

.PHONY: crash-points
crash-points: setup ## cut the power after every system call of an update: COUNT crash images (default 1,000,000) and a fifth as many of a second cut, in WORKERS processes
	$(BIN)/python -m tests.crash_points --count $(if $(filter file,$(origin COUNT)),1000000,$(COUNT)) --seed $(SEED) --workers $(WORKERS)

.PHONY: sim-determinism
sim-determinism: setup ## run COUNT seeds of the simulator twice, with other hashes, and compare their traces (default 200)
	$(BIN)/python -m tests.determinism --count $(COUNT)

.PHONY: sim-soak
sim-soak: setup ## 100,000 updates and a million faults in the simulator: 150 seeds of 500 devices (an hour of one core; SOAK_SEEDS=N)
	$(BIN)/whimbrel-sim soak --devices 500 --count $(SOAK_SEEDS) --workers 2

.PHONY: sim-soak-today
sim-soak-today: setup ## the same with 8 seeds that no other day has (two minutes)
	$(BIN)/whimbrel-sim soak --devices 500 --first $$(date -u +%Y%m%d)000 --count 8 --workers 2

.PHONY: sim-agreement
sim-agreement: setup ## run three scenarios in virtual time and live, 100 devices each; fails beyond 15 % (half an hour; needs mosquitto)
	@status=0; for scenario in slow-links on-and-off broker-outage; do \
		$(BIN)/whimbrel-sim agree --scenario $$scenario --report whimbrel-agree-$$scenario.html || status=1; \
	done; exit $$status

.PHONY: sim-defects
sim-defects: setup ## plant defects in the device's code, and count the seeds until the simulator finds each
	$(BIN)/python -m tests.defects

.PHONY: conformance
conformance: setup ## run the public tuf-conformance suite over the device's verification: SUITE=its checkout (needs faketime)
	@command -v faketime >/dev/null || { echo "whimbrel: faketime is missing (apt-get install faketime)" >&2; exit 1; }
	@[ -d "$(SUITE)/tuf_conformance" ] || { echo "whimbrel: SUITE=$(SUITE) is no checkout of github.com/theupdateframework/tuf-conformance" >&2; exit 1; }
	cd "$(SUITE)" && "$(CURDIR)/$(BIN)/python" -m pytest -q -c pyproject.toml -p no:cacheprovider tuf_conformance --entrypoint "$(CURDIR)/tests/conformance/whimbrel"

.PHONY: fuzz
fuzz: ## fuzz the model parsers and the delta reader, each for MINUTES (default 1), WORKERS at a time; fails on a finding
	$(call environment,fuzz)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --workers $(WORKERS)

.PHONY: browser-test
browser-test: setup ## drive the server's page in Chromium: rollouts, keys alone, accessibility, 1,000 live devices; schemathesis over its API
	$(call environment,browser)
	@command -v chromium >/dev/null || { echo "whimbrel: Chromium is not installed: apt-get install chromium" >&2; exit 1; }
	$(BIN)/python -m pytest tests/browser
	@echo "pictures are in .cache/browser"

.PHONY: token-test
token-test: setup ## sign with a key on a token (PKCS 11): SoftHSM in the place of the device (apt-get install softhsm2 opensc)
	$(call environment,token)
	$(BIN)/python -m pytest tests/tokens

.PHONY: mutation
mutation: setup ## remove every check of trust, chunks, importers and deltas, one by one: a test has to fail (goes on where it was stopped)
	$(BIN)/python -m tests.mutation --workers $(WORKERS)

.PHONY: bench-transport
bench-transport: setup ## measure chunk delivery: cached groups against per-device replies, both brokers
	$(BIN)/python -m benchmarks.transport

.PHONY: bench-trust
bench-trust: setup ## measure what trust costs: bytes of metadata, verification time and memory, certificates, signed reports (BENCH_OPTIONS='--json')
	$(BIN)/python -m benchmarks.trust $(BENCH_OPTIONS)

.PHONY: bench-encryption
bench-encryption: setup ## measure what encrypted artifacts cost a device and a server, beside the same ones as they are
	$(BIN)/python -m benchmarks.encryption

.PHONY: rollout-stats
rollout-stats: setup ## play 10,000 rollouts for each failure rate: false stops and devices exposed, beside two rules by thresholds (WORKERS processes; two to four minutes)
	$(BIN)/python -m benchmarks.rollout_stats --workers $(WORKERS)

.PHONY: wheels
wheels: ## build the wheels for x86-64, ARM and everything else into dist/ (fetches a 100 MB compiler once)
	$(call environment,wheels)
	$(BIN)/python -m tools.wheels dist

.PHONY: deb
deb: ## build Debian packages of the agent for x86-64 and ARM into dist/ (DEB_OPTIONS='--arch arm64 --python 3.13')
	$(call environment,wheels)
	$(BIN)/python -m tools.deb dist $(DEB_OPTIONS)

.PHONY: at-rest
at-rest: setup ## measure an agent at rest: memory, processor and traffic over a minute
	$(BIN)/python -m benchmarks.at_rest $(AT_REST_OPTIONS)

.PHONY: arm64-vectors
arm64-vectors: ## apply the golden vectors on an emulated 64-bit ARM processor (needs Debian and qemu-user-static)
	$(call environment,wheels)
	$(BIN)/python -m tools.arm64 tests/protocol/test_delta_vectors.py

.PHONY: arm64
arm64: setup ## install the package in a clean Debian for 64-bit ARM, emulated: an update, a kill, a rollback (root, debootstrap, qemu-user-static, mosquitto)
	$(call environment,wheels)
	$(BIN)/python -m tools.arm64_device

.PHONY: accelerators
accelerators: setup ## run models on other builds of the runtimes (ACCELERATORS='openvino cuda vulkan'; 900 MB, the last compiles for twenty minutes)
	$(BIN)/python -m tools.accelerators $(ACCELERATORS)

.PHONY: bench-native
bench-native: ## measure C with ctypes against numba, Cython, Rust and pure Python, also on an emulated ARM processor
	$(call environment,wheels)
	$(BIN)/python -m benchmarks.native

.PHONY: bench-delta
bench-delta: ## measure the delta coder beside its peers on real pairs of models (PAIRS=GLOB; trains them first: hours)
	$(call environment,bench)
	@command -v zstd >/dev/null && command -v xdelta3 >/dev/null || echo "note: apt-get install zstd xdelta3, or they are left out"
	$(BIN)/python -m benchmarks.delta --pairs '$(PAIRS)' $(BENCH_OPTIONS)

.PHONY: bench-delta-large
bench-delta-large: ## measure the delta coder on files of 0.1, 1 and 4 GB: linear time, bounded memory (needs 14 GB of disk)
	$(call environment,bench)
	$(BIN)/python -m benchmarks.large $(BENCH_OPTIONS)

.PHONY: bench-requantize
bench-requantize: ## measure chosen quantized files beside plain ones: bytes, divergence, flips (trains models first: hours; BENCH_OPTIONS='--cells GLOB')
	$(call environment,bench)
	$(BIN)/python -m benchmarks.pairs 'large.*' 'lora.q4_0' 'tiny.q4_0' 'last2.q4_0' 'facts.q4_0' 'chain*.q4_0'
	$(BIN)/python -m benchmarks.requantize $(if $(EVALS),--evals '$(EVALS)') $(BENCH_OPTIONS)

.PHONY: requantize-pair
requantize-pair: ## make the models of requantize-loop: SmolLM2-135M, trained on and quantized (PyTorch, some minutes)
	$(call environment,bench)
	$(BIN)/python -m benchmarks.pairs large.q4_0

.PHONY: requantize-loop
requantize-loop: setup ## a requantized file of SmolLM2 through the whole loop: chosen, judged, scored, signed, sent to 4 live devices as a delta, tried, committed (a quarter to half an hour of two processors that have nothing else to do; BENCH_OPTIONS='--budget 0.3%')
	$(BIN)/python -m benchmarks.requantize_loop $(BENCH_OPTIONS)

.PHONY: bench-requantize-onnx
bench-requantize-onnx: ## the same for an ONNX model, MiniLM as int8 and int4 (minutes; BENCH_OPTIONS=int8: one of them)
	$(call environment,bench)
	$(BIN)/python -m benchmarks.pairs 'minilm-large.*'
	$(BIN)/python -m benchmarks.requantize_onnx $(BENCH_OPTIONS)

.PHONY: bench-score
bench-score: setup ## scorecards of SmolLM2 in three quantizations, and the same by other means: EVALS=folder with mmlu/ and gsm8k/ (SAMPLE=N questions)
	@[ -d "$(EVALS)/mmlu/test" ] || { echo "whimbrel: EVALS=$(EVALS) has no mmlu/test (github.com/hendrycks/test) beside gsm8k/test.jsonl (github.com/openai/grade-school-math)" >&2; exit 1; }
	$(BIN)/python -m benchmarks.scorecard --mmlu "$(EVALS)/mmlu" --gsm8k "$(EVALS)/gsm8k/test.jsonl" --sample $(SAMPLE) $(BENCH_OPTIONS)

.PHONY: bench-diagnosis
bench-diagnosis: ## whether `whimbrel diagnose` names what is wrong with models that were really trained (trains them first: an hour)
	$(call environment,bench)
	$(BIN)/python -m benchmarks.diagnosis $(BENCH_OPTIONS)

.PHONY: fault-matrix
fault-matrix: setup ## put a device under every fault in every state, and write the table of what it does into docs/durability.md
	$(BIN)/python -m tests.device.fault_matrix docs/durability.md

.PHONY: diagram
diagram: setup ## write the state diagram into README.md and protocol/SPEC.md
	$(BIN)/python -m tools.diagram README.md protocol/SPEC.md

.PHONY: lock
lock: setup ## pin all dependencies anew (needs uv)
	tools/lock.sh

.PHONY: clean
clean: ## remove the environment and everything generated
	rm -rf .venv .cache dist whimbrel-report.html whimbrel-llm-report.html whimbrel-agree-*.html
