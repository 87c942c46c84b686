# Every target does its own set-up: a fresh machine needs only Python 3.11 or 3.12, pip and make.
PYTHON ?= python3
# Bytecode is written whatever an image or a CI machine has set: without it every process compiles
# thousands of modules of SGLang's and torch's anew, half a minute each time.
unexport PYTHONDONTWRITEBYTECODE
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Other people's clients, whose pins are not SGLang's: an environment of their own, with a Node.js.
CLIENTS       := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed
CLIENTS_TESTS := tests/server/clients

# The prompt and size of `make generate`, and with which checkpoint (a folder or a repo id; none is the demo).
MODEL  ?=
override DEMO := demo-model/krea-2-demo
ifeq ($(strip $(MODEL)),)
PROMPT ?= a red heart on a yellow background
WIDTH  ?= 256
HEIGHT ?= 256
else
PROMPT ?= a red fox sitting in fresh snow, golden hour, photorealistic
WIDTH  ?= 512
HEIGHT ?= 512
endif
STEPS  ?= 8
OUTPUT ?= outputs

# Where `make serve` listens, and what else krea2-serve is told.
PORT       ?= 30000
SERVE_ARGS ?=

.PHONY: install serve generate test test-unit test-slow lint lock lock-clients bench bench-check bench-baseline docs bench-http bench-gpu bench-quantization bench-fidelity bench-sensitivity bench-ray bench-threads bench-adapters bench-start simulate drills clean

install: $(STAMP)

# --require-hashes: what is installed is what was locked, whatever index serves it.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "krea2-srt needs Python 3.11 or 3.12, this is %d.%d; try make PYTHON=python3.12" % v)'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

# --ignore-scripts: packages are unpacked, and nothing of theirs runs.
$(CLIENTS_STAMP): $(CLIENTS_TESTS)/python/requirements.lock $(CLIENTS_TESTS)/node/package-lock.json | $(STAMP)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(CLIENTS)
	$(BIN)/uv pip sync --quiet --python $(CLIENTS)/bin/python --require-hashes $<
	PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm ci --prefix $(CLIENTS_TESTS)/node --ignore-scripts --no-audit --no-fund --silent
	touch $@

# Again where the package has other weights, or another adapter.
$(DEMO): $(wildcard krea2_srt/demo/weights-* krea2_srt/demo/sepia.*) | $(STAMP)
	rm -rf $(DEMO).new
	$(BIN)/krea2-demo-model $(DEMO).new >/dev/null
	rm -rf $(DEMO) && mv $(DEMO).new $(DEMO) && touch $(DEMO)

# Passed through the environment, so that no quote or dollar sign in them reaches the shell's parser.
export MODEL PROMPT OUTPUT
ifeq ($(strip $(MODEL)),)
serve generate: export MODEL := $(DEMO)
serve generate: $(DEMO)
endif

# exec: Ctrl-C and SIGTERM reach the server itself, which finishes what it has accepted.
serve: $(STAMP)
	if [ -d "$$MODEL/loras" ]; then export KREA2_SRT_LORA_DIR="$${KREA2_SRT_LORA_DIR:-$$MODEL/loras}"; fi; \
	exec $(BIN)/krea2-serve --model-path "$$MODEL" --port $(PORT) $(SERVE_ARGS)

generate: $(STAMP)
	$(BIN)/sglang generate --model-path "$$MODEL" --prompt "$$PROMPT" --num-inference-steps $(STEPS) \
	  --height $(HEIGHT) --width $(WIDTH) --save-output --output-path "$$OUTPUT"

# As many at a time as there are cores; each holds some 2 GB.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# What needs neither torch nor a server; less than a minute.
test-unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit

# Also with the clients that people use, for real.
test-slow: $(STAMP) $(CLIENTS_STAMP)
	$(BIN)/python -m pytest -m slow --numprocesses auto --maxprocesses 4

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ours against unmodified SGLang on CPUs: three mixes, a sweep of rates, 210 requests of each mix to
# each side; under 20 minutes on two cores. Writes benchmarks/results/cpu.*.json and the report.
MIXES := uniform-256=256x256:steps=8 uniform-512=512x512:steps=8 \
  mixed=256x256:steps=8:weight=11,512x512:steps=8:weight=2,1024x1024:steps=8:weight=1
bench: $(STAMP) $(DEMO)
	$(BIN)/krea2-bench compare --server ours --server sglang --checkpoint $(DEMO) \
	  $(foreach mix,$(MIXES),--mix $(mix)) --load 0.9,2,4 --rounds 5 --requests 14 --alone 2 \
	  --output benchmarks/results/cpu
	$(BIN)/krea2-bench report $(foreach mix,$(MIXES),benchmarks/results/cpu.$(firstword $(subst =, ,$(mix)))) \
	  --title "krea2-srt against unmodified SGLang, on CPUs" --output benchmarks/results/report

# Ratios of what the host does to plain work, against the last committed ones, and what the threads'
# waiting costs; three minutes on cores that nobody else uses, longer when they are busy: what is worse is repeated.
bench-check: $(STAMP) $(DEMO)
	$(BIN)/krea2-bench micro --checkpoint $(DEMO) --check benchmarks/results/micro.json

# Puts the figures of benchmarks/results/ and the tables of settings into the pages.
docs: $(STAMP)
	$(BIN)/python -m krea2_bench.docs

# Stages, decoders, memory and starts, in a table; about ten minutes on two cores.
bench-baseline: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.cpu_baseline --model $(DEMO)

# On a machine with a GPU; ten minutes by estimate, and the most valuable first: --budget-s 240 is
# for one that is there for minutes. Writes the table in benchmarks/results/.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

# Errors of 8-bit matrices, a minute on two cores; then the time of a step against bf16, four minutes
# on cores that nobody else uses.
bench-quantization: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.quantization --model $(DEMO)

# The demo's pictures in int8 and fp8 beside those in bf16, 200 prompts; four minutes on two quiet cores.
bench-fidelity: $(STAMP) $(DEMO)
	$(BIN)/python -m tools.demo_model.fidelity --model $(DEMO)

# What each of the demo's matrices loses in 8 bits, and which should stay in 16; some five minutes on two cores.
bench-sensitivity: $(STAMP) $(DEMO)
	$(BIN)/krea2-bench quality --sensitivity --checkpoint $(DEMO) --prompts tools/demo_model/prompts.txt \
	  --size 128x128 --budget-s 600 --output benchmarks/results/sensitivity

# Ways for the engine's threads to wait, alone and beside a process that computes; ten minutes on two
# cores that nobody else uses.
bench-threads: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.threads --model $(DEMO)

# Packs with adapters, first requests, and eight tenants with one each against unmodified SGLang, on
# quiet cores; ten minutes. Writes the table in benchmarks/results/.
bench-adapters: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.adapters --model $(DEMO)

# Starts from a slow disk, on quiet cores; about ten minutes. Writes the table in benchmarks/results/.
bench-start: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.cold_start --model $(DEMO)

# What the HTTP layer costs; about two minutes.
bench-http: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.http_overhead --model $(DEMO)

# Replicas on Ray Serve: two against one, and routers; about 20 minutes on two cores.
bench-ray: $(STAMP) $(DEMO)
	$(BIN)/python -m krea2_bench.ray_serve --model $(DEMO)

# Breaks servers of its own and sees that docs/operations.md is right; about eight minutes.
drills: $(STAMP) $(DEMO)
	$(BIN)/python -m tests.e2e.drills --model $(DEMO)

# Policies and SGLang's way on simulated H200s; needs no GPU, about ten minutes on one core.
simulate: $(STAMP)
	$(BIN)/python -m krea2_bench.simulate

# Needs $(BIN)/uv. The lock names versions and hashes, never the index they came from.
lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --quiet --extra dev --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate \
	  --output-file requirements.lock

# After an edit of requirements.in or package.json. --no-config: what SGLang's pins need is not theirs.
lock-clients: $(STAMP) $(CLIENTS_STAMP)
	$(BIN)/uv pip compile $(CLIENTS_TESTS)/python/requirements.in --quiet --no-config --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate \
	  --output-file $(CLIENTS_TESTS)/python/requirements.lock
	PATH="$(CURDIR)/$(CLIENTS)/bin:$$PATH" npm install --prefix $(CLIENTS_TESTS)/node --package-lock-only --ignore-scripts --no-audit --no-fund

clean:
	rm -rf $(VENV) $(CLIENTS) $(CLIENTS_TESTS)/node/node_modules demo-model outputs
