"""The run folder: what a training run leaves behind, written by the main process as it goes.

`config.yaml`, `environment.json`, `metrics.jsonl` (one line per optimizer step, and the held-out losses),
`summary.json`, `plots/`, `model/`. It is the same for all seven projects; the tracker gets a copy.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from common import report
from common.config import BaseConfig, accumulation_steps, save_config
from common.data import describe_counts
from common.errors import UserError, full_disk
from common.export import Export, check_space, gather_all
from common.files import check_writable, remove, write_json
from common.hub import push_to_hub
from common.json_lines import JsonLines, finite
from common.metrics import HostMemory, StartUp, flops_per_token, peak_flops, peak_gpu_gib
from common.model_card import model_card
from common.progress import Progress
from common.redaction import without_secrets
from common.runtime import check_finite, launcher_pid
from common.tracking import check_tracker, start_tracker

WARM_UP_STEPS = 5  # left out of the summary's throughput: compilation, caches, growing buffers


class RunFolder:
    """Bookkeeping of one run; a context manager that records a failure. It does nothing on ranks but the main one.

    If the run `exports` a model at its end, that it can is tried here. Raises `UserError` if it cannot, if the folder
    cannot be written, and instead of any error that a full disk caused. `advice` is what a run prints that has no steps
    left; empty: nothing.
    """

    def __init__(
        self,
        cfg: BaseConfig,
        project: str,
        is_main: bool,
        environment: dict,
        exports: bool = True,
        advice: str = "To train on, set train.max_steps higher",
    ):
        self.cfg, self.project, self.is_main = cfg, project, is_main
        self.path = Path(cfg.output_dir).resolve()
        self.checkpoints = self.path / "checkpoints"
        self.model = (self.path / "model").resolve()  # the export is renamed into its place: a link is not replaced
        self._advice = advice
        self._begun = False
        self._rows: dict = {}
        self._environment = environment
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        if not is_main:
            return
        # Nothing of an earlier run in this folder is touched before the new one begins: it may yet be refused.
        check_tracker(cfg)
        check_writable(cfg.output_dir)
        if exports:
            self._export = Export(cfg.model, self.model, cfg.export.dtype)
        self._host = HostMemory(launcher_pid())
        self._start_up = StartUp(environment.get("started_at", time.time()))
        self._start_up.end("imports")

    def begin(
        self,
        model: torch.nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        first_step: int,
        total_steps: int,
        checkpoint: Path | None,
    ) -> None:
        """The training begins (`first_step` is 0) or resumes from `checkpoint`; every rank calls this.

        Raises `UserError` on a machine that does not see the run folder of the main process.
        """
        if not self.path.is_dir():
            raise UserError(f"output_dir={self.cfg.output_dir} is not on this machine: all machines must share it")
        if not self.is_main:
            return
        self._start_up.end("model")
        check_space(self.path, sum(p.numel() for p in model.parameters()), self.checkpoints, first_step < total_steps)
        self._remove_stale(first_step, total_steps)
        save_config(self.cfg, self.path / "config.yaml")
        write_json(self.path / "environment.json", self._environment)
        if checkpoint and checkpoint.parent.resolve() != self.checkpoints.resolve():  # another run folder's
            self._take_over_history(checkpoint.parent.parent)
        self._metrics.keep_up_to(first_step if first_step else -1)
        earlier = self._metrics.read()
        self._earlier_seconds = earlier[-1]["seconds"] if earlier else 0.0
        self._began = time.perf_counter()
        self._device = device
        self._flops_per_token = flops_per_token(model, self.cfg.data.max_length)
        peak = peak_flops(device, dtype)
        share = Fraction(self._environment.get("gpu_share", "").partition(" ")[0] or 1)  # "1/8 of GPU 0": of its peak
        self._peak = peak * self._environment["world_size"] * share if peak else None
        self._tracker = start_tracker(self.cfg, self.path, self.project)
        if first_step < total_steps:
            self._print_banner(model, device, total_steps)
        if first_step >= total_steps and self._advice:
            print(f"This run is complete: step {first_step} of {total_steps}. {self._advice}", flush=True)
        elif 0 < first_step < total_steps:
            print(f"Resuming from the checkpoint of step {first_step}", flush=True)
        self._progress = Progress("Training", "step", total_steps, first_step)
        self._begun = True

    def _print_banner(self, model: torch.nn.Module, device: torch.device, total_steps: int) -> None:
        """What is about to be trained, and how: what a user checks before leaving a run alone."""
        train, ranks = self.cfg.train, self._environment["world_size"]
        pipelines = self._environment.get("pipeline", {}).get("pipelines")
        shares, name = (pipelines, "pipeline") if pipelines else (ranks, "rank")
        accumulation = accumulation_steps(self.cfg, shares, f"{name}s")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"\n{self.project}")
        for label, value in (
            ("model", f"{self.cfg.model.name}, {parameters / 1e6:,.1f} million parameters"),
            ("data", f"{self.cfg.data.name}, {self.cfg.data.format}, up to {self.cfg.data.max_length} tokens"),
            ("precision", self._environment.get("precision", "")),
            ("devices", report.devices(self._environment, device.type)),
            (
                "batch",
                f"{train.global_batch_size} sequences = {_counted(shares, name)} × {train.micro_batch_size} per "
                f"micro-batch × {_counted(accumulation, 'accumulation step')}",
            ),
            ("steps", f"{total_steps:,}"),
            ("folder", self.path),
        ):
            print(f"  {label:<10} {value}")
        print(flush=True)

    def _take_over_history(self, earlier: Path) -> None:
        """What `earlier` has measured so far is this run's; what another run left here is not, and goes."""
        (self.path / "tracking.json").unlink(missing_ok=True)
        self._metrics.path.unlink(missing_ok=True)
        if (earlier / self._metrics.path.name).is_file():
            shutil.copyfile(earlier / self._metrics.path.name, self._metrics.path)

    def _remove_stale(self, first_step: int, total_steps: int) -> None:
        """What an earlier run left here must not pass for this one's."""
        stale = []
        if first_step < total_steps:
            stale += ["summary.json", "eval.json", "samples.md", "plots"]
        if first_step == 0:
            stale += ["tracking.json"]
        if self.cfg.checkpoint.resume == "never":
            stale += ["checkpoints", "model"]
        for name in stale:
            remove(self.path / name)

    def log_rows(self, counts: dict) -> None:
        """What became of the rows of data: `counts` of `tokenized_rows`. Printed, and kept for the summary."""
        self._rows = counts
        if self.is_main:
            self._start_up.end("data")
            parts = (f"{name.replace('_', '-')}: {describe_counts(part)}" for name, part in counts.items())
            print(f"Data: {'; '.join(parts)}")

    def log_step(
        self, step: int, epoch: float, loss: float, learning_rate: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """One optimizer step of this many tokens, over all ranks, and seconds."""
        if not self.is_main:
            return
        self._start_up.end("first_step")
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds, 5),
            "peak_gpu_gib": round(peak_gpu_gib(self._device), 3),
            "peak_host_gib": round(self._host.peak_gib, 3),
        }
        self._write(record)
        self._progress.update(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s")

    def log_evaluation(self, step: int, eval_loss: float) -> None:
        """The held-out loss after `step` optimizer steps (0: before training).

        Raises `UserError` if it is not finite: what the last update has spoilt shows here first.
        """
        if self.is_main:
            check_finite(step, eval_loss, 0)
            self._write({"step": step, "eval_loss": eval_loss})
            self._progress.write(f"Step {step}: held-out loss {eval_loss:.4f}")

    def save_model(self, model, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> None:
        """Export `model/`: Hugging Face safetensors, the base's other files and a model card; a whole one or none.

        Every rank calls this. `gather` gives the whole of a sharded tensor; it may be a collective.
        """
        if self.is_main:
            summary, export = self.summarize("completed"), self._export
            export.write(model, model_card(self.cfg, summary, self._environment, export.base_card), gather)
        else:
            gather_all(model, gather)

    def finish(self, status: str, reason: str | None = None, **figures) -> None:
        """The training is over: `completed`, `interrupted` (and why), or `stopped` by a search. Summary, plots, upload.

        `figures` stand in the summary, instead of its own if they have their names.
        """
        if not self.is_main:
            return
        self._begun = False
        self._progress.close()
        if status == "interrupted":
            how = "the same command" if self.cfg.checkpoint.resume == "auto" else "checkpoint.resume=auto"
            print(f"Stopped ({reason or 'asked to on another rank'}); {how} resumes from here")
        write_json(self.path / "summary.json", self.summarize(status) | figures)
        self._tracker.log_artifacts(*self._plots(), self.path / "summary.json")
        self._tracker.finish(status)
        report.print_summary(self.path)
        if self._tracker.url:
            print(f"tracker  {self._tracker.url}")
        if self.cfg.hub.repo_id and status == "completed":
            push_to_hub(self.cfg, self.path, self.model)
        if self.cfg.hub.repo_id and self.cfg.hub.push_checkpoints:
            # Another folder's if nothing was left to train, as for a search's best trial.
            newest = max(self.checkpoints.glob("step-*"), default=Path(self.cfg.checkpoint.resume))
            push_to_hub(self.cfg, self.path, newest, path_in_repo=f"checkpoints/{newest.name}")

    def _plots(self) -> list[Path]:
        try:
            from common import plots

            return plots.plot_training(self.path)
        except Exception as error:  # Matplotlib's fonts or caches, say: the run is a good one without pictures
            print(
                f"warning: the plots were not drawn: {str(error) or type(error).__name__}. To draw them: python -m "
                f"tools.compare {self.path}",
                file=sys.stderr,
            )
            return []

    def summarize(self, status: str) -> dict:
        """`summary.json`: figures of the whole run, those before an interruption included, from `metrics.jsonl`."""
        records = self._metrics.read()
        steps = [r for r in records if "loss" in r]
        held_out = [r for r in records if "eval_loss" in r]
        summary = {"project": self.project, "status": status, "steps": 0, "data": self._rows}
        if not steps:  # failed in its first step, or resumed another folder's last one without its history
            return summary
        steady = steps[WARM_UP_STEPS:] or steps
        evaluated = held_out and held_out[-1]["step"] == steps[-1]["step"]  # not if `train.max_steps` was lowered
        speed = sum(r["tokens"] for r in steady) / sum(r["step_seconds"] for r in steady)
        return summary | {
            "steps": steps[-1]["step"],
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "eval_loss_before": held_out[0]["eval_loss"] if held_out and held_out[0]["step"] == 0 else None,
            "eval_loss_after": held_out[-1]["eval_loss"] if status == "completed" and evaluated else None,
            "tokens_per_second": round(speed, 1),
            "flops_per_token": self._flops_per_token,
            "mfu": round(speed * self._flops_per_token / self._peak, 4) if self._peak else None,
            "peak_gpu_gib": max(r["peak_gpu_gib"] for r in steps) or None,  # null on a CPU
            "peak_host_gib": max(*(r["peak_host_gib"] for r in steps), round(self._host.peak_gib, 3)),
            "seconds": round(records[-1]["seconds"], 1),
            "startup": self._start_up.seconds,
        }

    def _write(self, record: dict) -> None:
        record["seconds"] = round(self._earlier_seconds + time.perf_counter() - self._began, 3)
        self._metrics.append(record)
        # A chart of zeros means nothing on a CPU.
        hidden = {"step"} if self._device.type == "cuda" else {"step", "peak_gpu_gib"}
        self._tracker.log({k: v for k, v in finite(record).items() if k not in hidden}, record["step"])

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        full = full_disk(error, self.path) if error is not None else None
        if self.is_main:
            self._host.stop()
            if full:  # what was half written when the disk was full is the room that the summary needs
                for leftover in (*self.checkpoints.glob(".writing-*"), *self.model.parent.glob(".writing-model*")):
                    shutil.rmtree(leftover, ignore_errors=True)
            if error is not None and self._begun:
                self._progress.close()
                reason = without_secrets(str(full or error) or kind.__name__)
                with contextlib.suppress(OSError):  # the first error is the one to report
                    write_json(self.path / "summary.json", self.summarize("failed") | {"error": reason})
                self._tracker.finish("failed")
        if full:
            raise full from None


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
