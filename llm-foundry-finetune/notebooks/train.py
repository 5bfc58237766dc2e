# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune OPT-1.3B on instructions with LLM Foundry
#
# LLM Foundry owns the training loop: what is trained, on what and how, stands in its YAML. It uses Composer's trainer,
# and FSDP to shard the model over both GPUs. Only the responses have a loss; the questions, with the text that some of
# them are about, are read.
#
# This notebook starts
# [`llm-foundry-finetune/train.py`](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/llm-foundry-finetune/train.py)
# on all GPUs and shows what came out. The script is the lesson: read it from top to bottom. On Kaggle choose the
# accelerator **GPU T4 x2** and switch the internet on. Training takes about 5 hours on two T4s: an estimate, not yet
# measured.

# %% _kg_hide-input=true jupyter={"source_hidden": true}
# Finds the code: the repository around this notebook, what a packed notebook unpacked, an attached dataset, or CODE.
import shutil
import subprocess
import sys
from pathlib import Path

CODE = "https://github.com/OWNER/multi-gpu-fine-tuning"
REVISION = "main"
scratch = Path("/kaggle/temp" if Path("/kaggle").is_dir() else ".", "multi-gpu-fine-tuning").resolve()
folders = (Path.cwd(), *Path.cwd().parents, scratch)
here = next((folder for folder in folders if (folder / "tools/notebook.py").is_file()), None)
attached = next(Path("/kaggle").glob("input/**/tools/notebook.py"), None)
if here is None and attached:
    here = shutil.copytree(attached.parent.parent, scratch)
    subprocess.run(["chmod", "-R", "u+rwX,+x", here], check=True)  # datasets lose the right to execute
elif here is None:
    (here := scratch).mkdir(parents=True)
    for command in (["init"], ["fetch", "--depth=1", CODE, REVISION], ["checkout", "FETCH_HEAD"]):
        if not shutil.which("git") or subprocess.run(["git", "-C", here, *command, "--quiet"]).returncode:
            shutil.rmtree(here)
            sys.exit(
                "No code here: import what `make kaggle` writes, attach a dataset with the repository, or set CODE"
            )
sys.path.insert(0, str(here))
print("The code is", f"in {here}" if here == scratch else "in the repository of this notebook")

# %% _kg_hide-input=true jupyter={"source_hidden": true}
from tools import notebook

notebook.show_figure("llm-foundry-finetune/foundry.svg")

# %%
notebook.install("fsdp")
notebook.check_machine()

# %% [markdown]
# ## How it works

# %%
notebook.show_code("llm-foundry-finetune/foundry.yaml model", "llm-foundry-finetune/foundry.yaml fsdp_config")

# %% [markdown]
# ## Parameters
#
# `config.yaml` is the real run: OPT-1.3B on the questions and answers of Dolly-15k. `smoke.yaml` trains a tiny model
# on Python's docstrings, in a minute or two, without a GPU. Any of their keys can be set in `SETTINGS`.

# %% tags=["parameters"]
CONFIG = "config.yaml"
SETTINGS = []  # such as ["train.max_steps=200", "train.learning_rate=1e-5"]
HUB_REPOSITORY = ""  # "you/name" uploads the model there; needs the secret HF_TOKEN
RUN = notebook.runs_folder() / "llm-foundry-finetune"

# %% [markdown]
# ## Secrets
#
# `HF_TOKEN` is needed for an upload only, `WANDB_API_KEY` to watch the run in W&B; without one it is logged offline.
# They come from Kaggle's secrets (*Add-ons → Secrets*) or the environment, and go into no file and no output.

# %%
notebook.use_secrets("HF_TOKEN", "WANDB_API_KEY")

# %% [markdown]
# ## Train
#
# The first start builds LLM Foundry's own environment, since it pins older versions of everything: 7 GB, a few
# minutes. Kaggle's environment stays as it is. The run saves a checkpoint before Kaggle ends the session
# (`runtime.max_hours`); if an earlier session's output is attached as input, it resumes from there. The output is the
# script's own; if it fails, the cell fails. First, a check compares what the run needs with this machine and
# estimates the time; after 20 steps the progress bar knows better.

# %%
settings = [f"output_dir={RUN}", f"hub.repo_id={HUB_REPOSITORY}"]
settings += notebook.earlier_checkpoint("llm-foundry-finetune", RUN)
notebook.launch("llm-foundry-finetune", CONFIG, *settings, *SETTINGS)

# %% [markdown]
# These versions trained the model, not the notebook's own, which the first cell lists.

# %%
notebook.show_versions(RUN)

# %% [markdown]
# ## What came out
#
# The loss of each step, and on the held-out rows before, in between and after; the learning rate; the speed of all
# processes together; the peak of memory so far.

# %%
notebook.show_plots(RUN, "loss", "learning_rate", "throughput", "memory")

# %% [markdown]
# ## On other settings
#
# What the programs in `bench/` measured, and on which hardware. What the columns mean, and why the figures are as they
# are, is in [the project's
# README](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/llm-foundry-finetune/README.md).

# %%
notebook.show_measured("llm-foundry-finetune")

# %% [markdown]
# ## What is kept
#
# `model/` is a plain Hugging Face folder; `eval.ipynb` compares it with the base model. On Kaggle the run lies on a
# disk that is cleared at the end of the session, for large checkpoints do not fit into the 20 GB that are kept; what
# matters is copied there.

# %%
notebook.keep(RUN, "llm-foundry-finetune")
