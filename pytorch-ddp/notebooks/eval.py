# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Base against fine-tuned: Qwen2-0.5B after DDP
#
# Both models read the same held-out rows, which never trained. Loss and perplexity say how well a model predicts the
# next token, token accuracy how often its first choice is right, and bits per byte the same as the loss, comparable
# between tokenizers. All GPUs work; the figures do not depend on their number.

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

# %%
from tools import notebook

notebook.install("ddp")
notebook.check_machine()

# %% [markdown]
# ## Parameters
#
# `CONFIG` and `SETTINGS` as in the training. The model is that of `train.ipynb`: of this session, or of its output
# attached as input.

# %% tags=["parameters"]
CONFIG = "config.yaml"
SETTINGS = []
MODEL = ""  # a Hub repository, such as "ash001/pytorch-DDP-Qwen-0.5B", instead of train.ipynb's
RUN = notebook.runs_folder() / "pytorch-ddp"

# %%
notebook.use_secrets("HF_TOKEN")
model = notebook.find_model("pytorch-ddp", RUN, MODEL)
notebook.evaluate("pytorch-ddp", CONFIG, f"output_dir={RUN}", *model, *SETTINGS)

# %% [markdown]
# ## Figures
#
# The arrows say which way is better. Where rows are questions with answers, ROUGE-L and exact match compare generated
# answers with the reference.

# %%
notebook.show_evaluation(RUN)

# %% [markdown]
# ## Samples
#
# Both models continue the same text, or answer the same question. The reference is what the dataset has. The
# base of `smoke.yaml` has random weights and writes nonsense.

# %%
notebook.show_samples(RUN, count=4)

# %% [markdown]
# ## What is kept
#
# On Kaggle the figures, samples and plots are copied to what is kept when the session ends.

# %%
notebook.keep(RUN, "pytorch-ddp")
