# Two commands do everything on a fresh machine:  make demo   make test
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
RUN := . .venv/bin/activate &&

.PHONY: help
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

# The stamp is newer than what it was built from, or the environment is brought up to date.
.venv/ready: requirements.txt pyproject.toml
	@echo "Building .venv: about 2 GB, a few minutes ..."
	[[ -x .venv/bin/python ]] || common/new_environment.sh $(PYTHON) .venv
	common/cpu_torch.sh .venv/bin/python $$(grep '^torch==' requirements.txt)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar on -r requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# LLM Foundry pins older versions of what the others use; its launch.sh calls the same script.
.venv-foundry/ready: llm-foundry-finetune/requirements.txt llm-foundry-finetune/build_environment.sh
	@llm-foundry-finetune/build_environment.sh

.PHONY: demo
demo: .venv/ready ## fine-tune and evaluate with DDP on two CPU processes: no GPU, no network
	@$(RUN) pytorch-ddp/launch.sh --config smoke.yaml output_dir=runs/pytorch-ddp/demo checkpoint.resume=never
	$(RUN) python pytorch-ddp/eval.py --config smoke.yaml output_dir=runs/pytorch-ddp/demo
	printf '%s\n' '' \
	  'What was made lies in runs/pytorch-ddp/demo: plots/loss.png, samples.md, model/, checkpoints/ ...' \
	  'Look at the run in MLflow:  .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/pytorch-ddp/mlflow.db' \
	  'Try next:' \
	  '  pytorch-ddp/launch.sh --config smoke.yaml output_dir=runs/mine train.learning_rate=1e-3 data.packing=wrapped' \
	  '  pytorch-ddp/launch.sh              the real run of pytorch-ddp/config.yaml, on GPUs' \
	  '  less pytorch-ddp/README.md         what DDP does, and what was measured'

.PHONY: test
test: .venv/ready .venv-foundry/ready lint ## everything: real launchers, trackers, Hub client, kill and resume
	@$(RUN) python -m pytest tests --numprocesses logical --maxprocesses 4 --dist loadfile

.PHONY: test-fast
test-fast: .venv/ready ## the tests that take under 4 minutes together
	@$(RUN) python -m pytest tests -m "not slow"

.PHONY: lint
lint: .venv/ready ## ruff, and whether READMEs' tables and notebooks are up to date
	@$(RUN) ruff check . && ruff format --check .
	$(RUN) python -m common.results --check && python -m common.notebook_files --check

.PHONY: format
format: .venv/ready ## put code and tables into their form
	@$(RUN) ruff check --fix . && ruff format .
	$(RUN) python -m common.results

.PHONY: notebooks
notebooks: .venv/ready ## write the .ipynb from their .py; REVISION=v1 pins the code that they fetch
	@$(RUN) python -m common.notebook_files $(REVISION)

# The embedded runs, as without a GPU. Those of deepspeed-offload's notebooks are about one.
.PHONY: record-notebooks
record-notebooks: .venv/ready .venv-foundry/ready ## execute all notebooks' embedded runs and keep what they show
	@$(RUN) for folder in */notebooks; do
	  [[ $$folder = deepspeed-offload/* ]] && export NPROC_PER_NODE=1 || export NPROC_PER_NODE=2
	  python -m common.notebook_record $$folder/train.py --config smoke.yaml checkpoint.resume=never
	  python -m common.notebook_record $$folder/eval.py --config smoke.yaml
	done

.PHONY: bench
bench: .venv/ready .venv-foundry/ready ## measure the projects on this machine's GPUs; records go to results/
	@$(RUN) for project in ddp fsdp offload pipeline foundry ray_train ray_tune; do python bench/$$project.py; done

.PHONY: compare
compare: .venv/ready ## compare the runs in RUNS (default: every run below runs/): a table and runs/comparison.png
	@$(RUN) python -m common.report $(or $(RUNS),$(dir $(wildcard runs/*/summary.json runs/*/*/summary.json)))
