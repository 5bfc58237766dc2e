"""What Ray Tune runs in a process of its own for each trial: the loop of trial.py, from one report to the next."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import time
from typing import Any

import space
import torch
from ray import tune
from settings import Config
from trial import train
from trials import Trials, lock
from watch import Stopping

from common.console import output_to
from common.errors import UserError
from common.files import write_json


class Trial(tune.Trainable):
    """A trial: trained up to its next evaluation whenever Ray asks for a result."""

    def setup(self, config: dict[str, Any], cfg: Config, trials: Trials, tokenizer, rows, held_out) -> None:
        if not trials.root.parent.is_dir():
            raise UserError(f"output_dir={trials.root.parent} is not on this machine: all machines must share it")
        self.trials, self.record = trials, trials.read(self.trial_name)
        self.training, self.output = iter(()), contextlib.ExitStack()
        if self.record.status == "failed":
            raise UserError(self.record.error)
        if self.record.status:  # Ray's state was older than the kill: this trial had ended
            return
        folder = self.record.folder
        # NOTE: kept as long as this process lives: one that outlived a killed search must not write there as well.
        self.lock = lock(folder / ".lock", 60, f"{folder}: another process still writes there; try again in a minute")
        write_json(folder / "parameters.json", config)
        self.stopping = Stopping(trials.root.parent)
        self.output.enter_context(output_to(trials.console(self.trial_name)))
        cfg = copy.deepcopy(cfg)
        cfg.train, cfg.output_dir = space.with_parameters(cfg, config), str(folder)
        cfg.hub.repo_id = ""
        os.environ["WANDB_RUN_GROUP"] = folder.parent.parent.name
        self.training = train(cfg, tokenizer, rows, held_out, self.stopping, is_trial=True, started_at=time.time())

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation; its result for ASHA, the table and the search algorithm."""
        if result := next(self.training, None):
            return result
        record = self.trials.read(self.trial_name)
        step, eval_loss = record.last
        interrupted = not self.record.status and step < self.trials.total_steps
        return {"step": step, "eval_loss": eval_loss, "done": not interrupted, "interrupted": interrupted}

    def cleanup(self) -> None:
        """ASHA has stopped the trial, or the search ends: `train` meets it where it last reported."""
        if hasattr(self.training, "close"):
            self.training.close()
            self.lock.close()
        self.output.close()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial takes over the process, so that it need not load Python's libraries and CUDA again."""
        self.cleanup()
        self.training = None
        gc.collect()
        torch.compiler.reset()  # what is compiled belongs to the old model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.setup(new_config)
        return True
