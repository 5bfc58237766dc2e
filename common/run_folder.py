"""The run folder: what a training run leaves behind, written by the main process as it goes.

`config.yaml`, `environment.json`, `metrics.jsonl` (a line an optimizer step, and the held-out losses), `summary.json`,
`plots/`, `model/`. It is the same for all seven projects, so that they can be compared; the tracker gets a copy.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from common import report
from common.config import BaseConfig, save_config
from common.errors import UserError
from common.hub import model_card, push_to_hub
from common.metrics import HostMemory, JsonLines, finite, flops_per_token, peak_flops, peak_gpu_gib
from common.tracking import start_tracker

WARM_UP_STEPS = 5  # left out of the summary's throughput: compilation, caches, growing buffers


class RunFolder:
    """Bookkeeping of one run; a context manager that records a failure. It does nothing on ranks but the main one.

    Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, cfg: BaseConfig, project: str, is_main: bool, environment: dict, root_pid: int):
        self.cfg, self.project, self.is_main = cfg, project, is_main
        self.path = Path(cfg.output_dir).expanduser().resolve()
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.status = "failed"
        self._environment = environment
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(cfg, self.path / "config.yaml")
            write_json(self.path / "environment.json", environment)
        except OSError as error:
            raise UserError(f"output_dir={cfg.output_dir}: cannot be written: {error.strerror}") from None
        self._host = HostMemory(root_pid)

    def begin(
        self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype, first_step: int, total_steps: int
    ):
        """The training begins (`first_step` is 0) or goes on: open the tracker and the progress bar."""
        if not self.is_main:
            return
        if first_step == 0:  # what an earlier run left here must not pass for this one's
            for stale in ("summary.json", "eval.json", "samples.md", "tracking.json"):
                (self.path / stale).unlink(missing_ok=True)
            shutil.rmtree(self.path / "plots", ignore_errors=True)
        self._metrics.keep_up_to(first_step if first_step else -1)
        earlier = self._metrics.read()
        self._earlier_seconds = earlier[-1]["seconds"] if earlier else 0.0
        self._began = time.perf_counter()
        self._device = device
        self._flops_per_token = flops_per_token(model, self.cfg.data.max_length)
        peak = peak_flops(device, dtype)
        self._peak = peak * self._environment["world_size"] if peak else None
        self._tracker = start_tracker(self.cfg, self.path, enabled=True)
        if first_step >= total_steps:
            print(f"This run is complete: step {first_step} of {total_steps}. To train on, set train.max_steps higher")
        elif first_step:
            print(f"Going on from the checkpoint of step {first_step}")
        self._bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", dynamic_ncols=True)

    def log_step(self, step: int, *, seconds: float, tokens: int, **values: float) -> None:
        """One optimizer step; `values` holds `epoch`, `loss`, `learning_rate` and `grad_norm`."""
        if not self.is_main:
            return
        record = {
            "step": step,
            **values,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds, 5),
            "peak_gpu_gib": round(peak_gpu_gib(self._device), 3),
            "peak_host_gib": round(self._host.peak_gib, 3),
        }
        self._write(record)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{tokens / seconds:,.0f}", refresh=False)
        self._bar.update()

    def log_evaluation(self, step: int, eval_loss: float) -> None:
        """The held-out loss after `step` optimizer steps (0: before training)."""
        if self.is_main:
            self._write({"step": step, "eval_loss": eval_loss})
            self._bar.write(f"Step {step}: held-out loss {eval_loss:.4f}")

    def save_model(self, model, tokenizer) -> None:
        """Export `model/`: plain Hugging Face safetensors, tokenizer and model card. A whole folder or none."""
        if not self.is_main:
            return
        partial = self.path / ".writing-model"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(self.cfg, self.summarize("completed")), encoding="utf-8")
        shutil.rmtree(self.model, ignore_errors=True)
        partial.rename(self.model)

    def finish(self, status: str, reason: str | None = None) -> None:
        """The training is over, `completed` or `interrupted` (and why): summary, plots, tracker, upload."""
        self.status = status
        if not self.is_main:
            return
        self._bar.close()
        if status == "interrupted":
            print(f"Stopped ({reason or 'asked to on another rank'}); the same command goes on from here")
        write_json(self.path / "summary.json", self.summarize(status))
        self._tracker.log_artifacts(*report.plot_training(self.path), self.path / "summary.json")
        self._tracker.finish(status)
        report.print_summary(self.path)
        if self._tracker.url:
            print(f"tracker  {self._tracker.url}")
        if self.cfg.hub.repo_id and status == "completed":
            push_to_hub(self.cfg, self.path, self.model)
        if self.cfg.hub.repo_id and self.cfg.hub.push_checkpoints:
            push_to_hub(self.cfg, self.path, self.checkpoints, path_in_repo="checkpoints")

    def summarize(self, status: str) -> dict:
        """`summary.json`: figures of the whole run, those before an interruption included, from `metrics.jsonl`."""
        records = self._metrics.read()
        steps = [r for r in records if "loss" in r]
        held_out = [r for r in records if "eval_loss" in r]
        steady = steps[WARM_UP_STEPS:] or steps
        speed = statistics.mean([r["tokens"] for r in steady]) / statistics.mean([r["step_seconds"] for r in steady])
        return {
            "project": self.project,
            "status": status,
            "steps": steps[-1]["step"],
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "eval_loss_before": held_out[0]["eval_loss"] if held_out else None,
            "eval_loss_after": held_out[-1]["eval_loss"] if status == "completed" and held_out else None,
            "tokens_per_second": round(speed, 1),
            "flops_per_token": self._flops_per_token,
            "mfu": round(speed * self._flops_per_token / self._peak, 4) if self._peak else None,
            "peak_gpu_gib": max(r["peak_gpu_gib"] for r in steps) or None,  # null on a CPU
            "peak_host_gib": max(*(r["peak_host_gib"] for r in steps), round(self._host.peak_gib, 3)),
            "seconds": round(records[-1]["seconds"], 1),
        }

    def _write(self, record: dict) -> None:
        record["seconds"] = round(self._earlier_seconds + time.perf_counter() - self._began, 3)
        self._metrics.append(record)
        numbers = finite(record)
        self._tracker.log({k: v for k, v in numbers.items() if k != "step" and v is not None}, record["step"])

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not self.is_main:
            return
        self._host.stop()
        if error is not None and self.status == "failed":
            summary = {"project": self.project, "status": "failed", "error": str(error) or kind.__name__}
            write_json(self.path / "summary.json", summary)
            if hasattr(self, "_tracker"):
                self._bar.close()
                self._tracker.finish("failed")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
