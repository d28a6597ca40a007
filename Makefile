# Every target sets up what it needs: one virtual environment, made anew when its inputs change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
RUFF := $(BIN)/ruff
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo demo-images test lint format tables bench-trajectory bench-dece_classification bench-dece_loss bench-sft_step bench-filters bench-weight_poisoning bench-recipe bench-recipe_step bench-purify bench-purifier_step bench-scaling bench-hub bench-code bench-crow bench-crow_step code-lm search-code search-dece search-trajectory search-recipe search-purify model-cards model-cards-runs test-lowest clean

help: ## this list
	@grep -hE '^[a-z_%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z_%-]+):.*## /  make \1|/' | awk -F'|' '{printf "%-26s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	# torch first and from the constraints: a range would take the newest build and gigabytes of CUDA packages.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[offline,dev]'
	@touch $@

demo: $(STAMP) ## poison, train, defend, measure: the whole product in about three minutes
	$(BIN)/hfbd train --preset offline --output_dir runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-images: $(STAMP) ## the same story on digits: a patch is planted, and removed with 300 clean images; under three minutes
	$(BIN)/hfbd train --preset digits --output_dir runs/demo-images-$$(date +%Y%m%d-%H%M%S)

demo-hub: $(STAMP) ## poison, defend, push, verify, load in another process: against a small Hub on this machine; two minutes
	$(BIN)/python -m tests.hub_server -- $(BIN)/python examples/hub_round_trip.py --repo owner/cleaned

test: $(STAMP) ## all tests, examples in docstrings included
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP) ## ruff and mypy
	$(RUFF) format --check .
	$(RUFF) check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite
	$(RUFF) format .
	$(RUFF) check --fix .

bench-trajectory: $(STAMP) ## the trajectory filter over three seeds; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.trajectory $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-dece_classification: $(STAMP) ## robust losses and the filter on SST-2 (and AG News); ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.dece_classification $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-dece_loss: $(STAMP) ## output projection and loss beside their peers; CUDA=1 for the large problem on a GPU
	$(BIN)/python -m benchmarks.dece_loss $(if $(CUDA),--cuda)

bench-sft_step: $(STAMP) ## a step of supervised fine-tuning beside trl's own; CUDA=1
	$(BIN)/python -m benchmarks.sft_step $(if $(CUDA),--cuda)

bench-weight_poisoning: $(STAMP) ## poisoned checkpoints, fine-tuned by a victim, and filters before them; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.weight_poisoning $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-filters: $(STAMP) ## what PSIM and its rivals cost per text, beside the victim alone; ONLY=psim,psim_mixed
	$(BIN)/python -m benchmarks.filters $(if $(ONLY),--only "$(ONLY)")

bench-recipe: $(STAMP) ## RECIPE on an encoder with planted triggers, beside its controls; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.recipe $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-recipe_step: $(STAMP) ## an update of RECIPE beside the same update the paper's way
	$(BIN)/python -m benchmarks.recipe_step

bench-purify: $(STAMP) ## D3 and ULRL on backdoored classifiers, beside FT-SAM and plain fine-tuning; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.purify $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-purifier_step: $(STAMP) ## an update of D3 and ULRL beside a plain one; SIZES="tiny-vit minilm vit-base"
	$(BIN)/python -m benchmarks.purifier_step $(if $(SIZES),--sizes $(SIZES))

bench-scaling: $(STAMP) ## samples per second with one process and with two, and what each defense adds; WORLDS="1 2 4 8" on GPUs
	$(BIN)/python -m benchmarks.scaling $(if $(WORLDS),--worlds $(WORLDS))

bench-hub: $(STAMP) ## a push with evidence beside huggingface_hub's own upload, and a card; over loopback
	$(BIN)/python -m benchmarks.hub

code-lm: $(STAMP) ## a small language model of code, pre-trained on Python's standard library; 20 to 50 minutes, once; SIZE=small on a GPU
	$(BIN)/python examples/pretrain_tiny_code_lm.py $(if $(SIZE),--size $(SIZE))

bench-code: code-lm ## DeCE on poisoned text-to-code rows, beside its controls; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.code_poisoning $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-crow: code-lm ## CROW on backdoored instruction models, beside plain fine-tuning; ONLY=cell, EXTENDED=1
	$(BIN)/python -m benchmarks.crow $(if $(ONLY),--only "$(ONLY)") $(if $(EXTENDED),--extended)

bench-crow_step: $(STAMP) ## an update of CROW beside a plain one, full and LoRA
	$(BIN)/python -m benchmarks.crow_step

search-code: code-lm ## the rate of bench-code by clean rows, and where DeCE's trade-off lies; validation rows, a seed of its own; EXTENDED=1
	$(BIN)/python -m benchmarks.code_search $(if $(EXTENDED),--extended)

search-dece: $(STAMP) ## where DeCE helps in classification: every setting, on validation rows and seeds of its own
	$(BIN)/python -m benchmarks.dece_search

search-trajectory: $(STAMP) ## when the filter takes its early snapshot: every choice, on seeds reported nowhere else
	$(BIN)/python -m benchmarks.trajectory_search

search-recipe: $(STAMP) ## RECIPE's dose, coefficient and trained weights, by held-out loss and without a trigger
	$(BIN)/python -m benchmarks.recipe_search

search-purify: $(STAMP) ## defaults of D3 and ULRL and the rate of their host, on validation rows and seeds of its own
	$(BIN)/python -m benchmarks.purify_search

model-cards: $(STAMP) ## render the cards in model_cards/ from the results kept there
	$(BIN)/python -m benchmarks.model_cards

model-cards-runs: $(STAMP) ## make the runs behind these cards, keep their results, render; about ten minutes
	$(BIN)/python -m benchmarks.model_cards --runs

tables: $(STAMP) ## render the tables of README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.tables

test-lowest: constraints-lowest.txt ## the tests against the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[offline,dev]'
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -p no:cacheprovider

clean: ## remove environments and caches, never runs/
	rm -rf $(VENV) .venv-lowest .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
