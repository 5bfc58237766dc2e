# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Search hyper-parameters for Qwen2-0.5B with Ray Tune
#
# Each trial fine-tunes the same model with other values: learning rate, weight decay, warm-up. ASHA compares them at
# fixed numbers of optimizer steps and stops the bad ones early. All trials have the same budget and the same schedule,
# so that they can be compared.
#
# This notebook starts
# [`ray-tune/train.py`](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/ray-tune/train.py) on all GPUs, a
# trial on each, and shows what came out. The script is the lesson: read it from top to bottom. On Kaggle choose the
# accelerator **GPU T4 x2** and switch the internet on. The search takes about 30 minutes on two T4s: an estimate, not
# yet measured.

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

notebook.show_figure("ray-tune/asha.svg")

# %%
notebook.install("ray")
notebook.check_machine()

# %% [markdown]
# ## How it works

# %%
notebook.show_code("ray-tune/train.py run_trials", "ray-tune/trial.py train_step")

# %% [markdown]
# ## Parameters
#
# `config.yaml` is the real search, with Qwen2-0.5B on film reviews from IMDB. `smoke.yaml` searches with a tiny model
# on Python's docstrings, in a minute or two, without GPU or download. Any of their keys can be set in `SETTINGS`.

# %% tags=["parameters"]
CONFIG = "config.yaml"
SETTINGS = []  # such as ["train.max_steps=200", "train.learning_rate=1e-5"]
HUB_REPOSITORY = ""  # "you/name" uploads the model there; needs the secret HF_TOKEN
RUN = notebook.runs_folder() / "ray-tune"

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
# A trial at a time on each GPU. The best one is trained to the full budget, if it did not get there in the search. A
# search that was stopped resumes when the cell is run again in the same session. The output is the script's own; if
# it fails, the cell fails. First, a check compares what the run needs with this machine and estimates the time; after
# 20 steps the progress bar knows better.

# %%
settings = [f"output_dir={RUN}", f"hub.repo_id={HUB_REPOSITORY}", *SETTINGS]
notebook.launch("ray-tune", CONFIG, *settings)

# %% [markdown]
# ## What came out
#
# The held-out loss of every trial; crosses are where ASHA stopped one. Then the loss against each hyper-parameter.

# %%
notebook.show_plots(RUN, "search", "search_parameters")

# %% [markdown]
# The best trial's run: the loss of each step, and on the held-out rows; the learning rate; the speed; the peak of
# memory so far.

# %%
notebook.show_plots(RUN, "loss", "learning_rate", "throughput", "memory")

# %% [markdown]
# ## On other settings
#
# What the programs in `bench/` measured, and on which hardware. What the columns mean, and why the figures are as they
# are, is in [the project's
# README](https://github.com/OWNER/multi-gpu-fine-tuning/blob/main/ray-tune/README.md).

# %%
notebook.show_measured("ray-tune")

# %% [markdown]
# ## What is kept
#
# `model/` is a plain Hugging Face folder; `eval.ipynb` compares it with the base model. On Kaggle the run lies on a
# disk that is cleared at the end of the session, for large checkpoints do not fit into the 20 GB that are kept; what
# matters is copied there.

# %%
notebook.keep(RUN, "ray-tune")
