# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune Qwen2-0.5B on two GPUs with PyTorch DDP
#
# Every GPU holds the whole model and works on its own part of each batch. While a GPU still computes the backward
# pass, DDP already averages the finished gradients with those of the other. Both then take the same step, so the two
# models stay equal.
#
# This notebook starts
# [`pytorch-ddp/train.py`](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/pytorch-ddp/train.py) on all GPUs
# and shows what came out. The script is the lesson: read it from top to bottom. On Kaggle choose the accelerator **GPU
# T4 x2** and switch the internet on.

# %%
import subprocess
import sys
from pathlib import Path

CODE = "https://github.com/OWNER/multi-gpu-fine-tuning"
REVISION = "main"
folders = (Path.cwd(), *Path.cwd().parents)
here = next((folder for folder in folders if (folder / "tools/notebook.py").is_file()), None)
if here is None:  # not opened in the repository: fetch it
    scratch = "/kaggle/temp" if Path("/kaggle").is_dir() else "."  # not among what Kaggle keeps
    here = Path(scratch, "multi-gpu-fine-tuning").resolve()
    subprocess.run(["git", "init", "--quiet", here], check=True)
    subprocess.run(["git", "-C", here, "fetch", "--quiet", "--depth=1", CODE, REVISION], check=True)
    subprocess.run(["git", "-C", here, "checkout", "--quiet", "FETCH_HEAD"], check=True)
sys.path.insert(0, str(here))

from tools import notebook

notebook.install("ddp")
notebook.check_machine()

# %% [markdown]
# ## How it works

# %%
notebook.show_figure("pytorch-ddp/ddp.svg")

# %% [markdown]
# ## Parameters
#
# `config.yaml` is the real run: Qwen2-0.5B on abstracts from arXiv. `smoke.yaml` trains a tiny model on Python's
# docstrings, in a minute or two, without GPU or download. Any of their keys can be set in `SETTINGS`.

# %% tags=["parameters"]
CONFIG = "config.yaml"
SETTINGS = []  # such as ["train.max_steps=200", "train.learning_rate=1e-5"]
HUB_REPOSITORY = ""  # "you/name" uploads the model there; needs the secret HF_TOKEN
RUN = notebook.runs_folder() / "pytorch-ddp"

# %% [markdown]
# ## Secrets
#
# `HF_TOKEN` is needed for an upload only. It comes from Kaggle's secrets (*Add-ons → Secrets*) or the environment, and
# goes into no file and no output.

# %%
notebook.use_secrets("HF_TOKEN")

# %% [markdown]
# ## Train
#
# One process for each GPU. The run saves a checkpoint before Kaggle ends the session (`runtime.max_hours`); where an
# earlier session's output is attached as input, it resumes from there. The output is the script's own; where it fails,
# the cell fails.

# %%
settings = [f"output_dir={RUN}", f"hub.repo_id={HUB_REPOSITORY}"]
settings += notebook.earlier_checkpoint("pytorch-ddp", RUN)
notebook.launch("pytorch-ddp", CONFIG, *settings, *SETTINGS)

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
# README](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/pytorch-ddp/README.md).

# %%
notebook.show_measured("pytorch-ddp")

# %% [markdown]
# ## What is kept
#
# `model/` is a plain Hugging Face folder; `eval.ipynb` compares it with the base model. On Kaggle the run lies on a
# disk that is cleared at the end of the session, for large checkpoints do not fit into the 20 GB that are kept; what
# matters is copied there.

# %%
notebook.keep(RUN, "pytorch-ddp")
