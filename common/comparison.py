"""`eval.py`: the base model against the fine-tuned one, on the held-out rows.

The rows and the loss are those of the training, so that the losses of `eval.json` are those of its `summary.json`.
Every figure is the same on any number of processes: batches are cut before they are distributed, and sums and counts
are reduced, never means.
"""

from __future__ import annotations

import filecmp
import importlib
import os
import re
import shlex
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, release_memory

from common import plots, report, runtime
from common.config import BaseConfig, ModelConfig, get, load_config
from common.data import Prompt, describe_counts, held_out_rows, prompt_tokens, tokenize
from common.errors import UserError
from common.evaluation import evaluate, figures, held_out_batches, predicted_bytes
from common.files import check_writable, write_json, write_whole
from common.generation import answer_scores, encode_prompt, generate, make_greedy, questions, without_rest
from common.loss import CausalLMLoss
from common.model_card import with_evaluation
from common.models import load_model, load_tokenizer, use_fused_attention
from common.progress import track
from common.tracking import log_results

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


SAMPLE_PARTS = [("prompt", "prompt"), ("reference", "reference"), ("base", "base"), ("fine-tuned", "fine_tuned")]


def compare(cfg: BaseConfig, *, project: str) -> dict[str, Any]:
    """Base model (`cfg.model`) against fine-tuned (`cfg.eval.model`, else `output_dir/model`) on the held-out split.

    On one process or on the processes of a launcher. Writes `eval.json`, `samples.md` and `plots/eval.png` into
    `cfg.output_dir`, prints a table and samples, and returns what `eval.json` holds. Raises `UserError` if there is
    no fine-tuned model, or its training's settings would make the comparison wrong, for a package that is missing, and
    for what loading models and data raises.
    """
    runtime.check_process_count()
    models = {"base": cfg.model, "fine_tuned": fine_tuned_model(cfg, project)}
    notes = check_training(cfg, Path(models["fine_tuned"].name))
    check_needs(cfg)
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=cfg.runtime.timeout_minutes))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[timeout])
    runtime.only_main_shows_progress(accelerator.is_main_process)
    for note in notes:
        accelerator.print(f"note: {note}")
    runtime.check_gpu(accelerator.device)
    runtime.limit_gpu_memory(cfg.runtime, accelerator.device)
    dtype, reason = runtime.resolve_precision(cfg.train.precision, accelerator.device)
    started = time.perf_counter()
    with accelerator.local_main_process_first():  # one process per machine downloads and converts, the other ones read
        held_out = held_out_rows(cfg.data, cfg.seed, is_main=accelerator.is_main_process)

    measured, answers = {}, {}
    for role, source in models.items():
        accelerator.print(f"evaluating {role.replace('_', '-')}: {source.name}")
        try:
            measured[role], answers[role] = _measure(source, cfg, held_out, accelerator, dtype)
        except torch.OutOfMemoryError as error:
            smaller = f"set eval.batch_size={cfg.eval.batch_size // 2}" if cfg.eval.batch_size > 1 else "free memory"
            raise UserError(f"{str(error).split('. GPU')[0]}: {smaller}") from None
        release_memory()  # this model, before the next one is loaded
    samples = [
        {"prompt": prompt.text, "reference": reference, "base": base, "fine_tuned": tuned}
        for (prompt, reference, base), (_, _, tuned) in zip(answers["base"], answers["fine_tuned"], strict=True)
    ][: cfg.eval.samples]
    results = {
        "project": project,
        **measured,
        "rows": measured["base"]["rows"],
        "seconds": time.perf_counter() - started,
        "environment": runtime.describe_environment(accelerator.num_processes, reason),
        "settings": {
            "data": cfg.data.name,
            "format": cfg.data.format,
            "max_length": cfg.data.max_length,
            "batch_size": cfg.eval.batch_size,
            "generate_rows": cfg.eval.generate_rows,
            "max_new_tokens": cfg.eval.max_new_tokens,
            "seed": cfg.seed,
        },
        "samples": samples,
    }
    if accelerator.is_main_process:
        _write(results, Path(cfg.output_dir))
        card = Path(cfg.output_dir) / "model/README.md"
        if not cfg.eval.model and card.is_file():
            write_whole(card, with_evaluation(card.read_text(encoding="utf-8"), results))
        _track(cfg, results)
        _print(results, Path(cfg.output_dir))
    accelerator.end_training()
    return results


def check_needs(cfg: BaseConfig) -> None:
    """Raise `UserError` for what only the end of an evaluation would miss: ROUGE-L's package, a folder to write to."""
    if cfg.data.format != "text" and cfg.eval.generate_rows:
        try:
            importlib.import_module("rouge_score.rouge_scorer")
        except ImportError as error:
            raise UserError(
                f"cannot compute ROUGE-L without rouge_score ({error}): pip install rouge_score, or set "
                f"eval.generate_rows=0 to go without"
            ) from None
    check_writable(cfg.output_dir)


def fine_tuned_model(cfg: BaseConfig, project: str) -> ModelConfig:
    """Where the fine-tuned model lies. Raises `UserError` with the command to run first if training left none."""
    if cfg.eval.model:
        return ModelConfig(name=cfg.eval.model)
    folder = Path(cfg.output_dir) / "model"
    if not (folder / "config.json").is_file():
        command = shlex.join([f"{project}/launch.sh", *sys.argv[1:]])
        raise UserError(f"{folder}: no fine-tuned model yet; train first: {command}\n(or set eval.model)")
    return ModelConfig(name=str(folder))


def check_training(cfg: BaseConfig, model: Path) -> list[str]:
    """What to know of the run whose `model/` this is; nothing if the model does not lie in a run folder.

    Raises `UserError` if rows that it trained on would pass for held out, or it began with another base model.
    """
    run_dir, notes = model.parent, []
    path = run_dir / "config.yaml"
    if not (model.is_dir() and path.is_file()):
        return notes
    try:
        trained = load_config(type(cfg), path, [])
    except UserError:  # another project's
        return notes
    same_data = _is_same(trained.data.name, cfg.data.name) and trained.data.subset == cfg.data.subset
    keys, why = [], "the base would be another model"
    if _place(trained.model.name) != _place(cfg.model.name):
        keys = ["model.name"]
    elif not same_data:
        notes += [f"the model was trained on {trained.data.name}, not on {cfg.data.name}"]
    elif trained.data.split == (cfg.data.eval_split or cfg.data.split):
        why = "rows that it trained on would pass for held out"
        if trained.data.eval_split:
            keys = ["data.eval_split"]
        elif cfg.data.eval_rows > trained.data.eval_rows:  # fewer are the first ones of the same
            keys = ["data.eval_rows"]
        keys += ["seed"] * (cfg.seed != trained.seed)
    if cfg.data.format == "messages" and trained.data.date != cfg.data.date:
        notes += [f"the model was trained with data.date={trained.data.date}, and this is data.date={cfg.data.date}"]
    if keys:
        settings = ", ".join(f"{key}={get(cfg, key)} (training: {get(trained, key)})" for key in keys)
        raise UserError(f"{settings}: {why}; set it as in the training, or evaluate with its settings: --config {path}")
    summary = report.read_summary(run_dir) if (run_dir / "metrics.jsonl").is_file() else {"status": "completed"}
    if summary["status"] != "completed":
        notes += [f"{run_dir} was continued after this model was exported; it is at step {summary['steps']} now"]
    return notes


def _is_same(name: str, other: str) -> bool:
    """Whether both are the same data: by name, or by what is in the file."""
    if os.path.isfile(name) and os.path.isfile(other):
        return filecmp.cmp(name, other, shallow=False)
    return _place(name) == _place(other)


def _place(name: str) -> str:
    """A Hub id, or an absolute path: a folder or file has many names."""
    return os.path.realpath(name) if os.path.exists(name) else name


def _measure(
    source: ModelConfig, cfg: BaseConfig, held_out: Dataset, accelerator: Accelerator, dtype: torch.dtype
) -> tuple[dict[str, Any], list[tuple[Prompt, str, str]]]:
    """One model's figures, and (prompt, reference, answer) of the first rows. The same on every process."""
    started = time.perf_counter()
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    tokenizer = load_tokenizer(source, cfg.seed)
    model = load_model(source, cfg.seed).to(device)
    use_fused_attention(model, device, dtype)
    rows = tokenize(held_out, cfg.data, tokenizer, packing="none")
    if rows.counts["dropped"] or rows.counts["cut"]:
        accelerator.print(f"held-out: {describe_counts(rows.counts)}")

    batches = held_out_batches(rows, cfg.eval.batch_size, tokenizer.pad_token_id, rank, world_size)
    progress = "held-out loss" if accelerator.is_main_process else ""
    sums = accelerator.reduce(evaluate(CausalLMLoss(model, dtype), batches, device, progress))
    # A folder is named from the run folder, since the record may be published and the disk it was on may not.
    name = os.path.relpath(source.name, cfg.output_dir) if Path(source.name).is_dir() else source.name
    measured = {"model": name, "rows": len(rows), "data": rows.counts}
    measured |= figures(sums, predicted_bytes(rows, tokenizer))

    scored = cfg.eval.generate_rows if cfg.data.format != "text" else 0  # a text has no one right continuation
    wanted = min(max(scored, cfg.eval.samples), len(held_out))
    asked = questions(held_out.select(range(wanted)), cfg.data, tokenizer)
    answers = _answer([prompt for prompt, _ in asked], cfg, model, tokenizer, accelerator, dtype)
    if scored:
        measured |= answer_scores(answers[:scored], [reference for _, reference in asked[:scored]])
    return {**measured, "seconds": time.perf_counter() - started}, [
        (prompt, reference, answer) for (prompt, reference), answer in zip(asked, answers, strict=True)
    ]


def _answer(
    prompts: list[Prompt],
    cfg: BaseConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> list[str]:
    """A generated answer for each prompt, on every process; here, too, whole batches are distributed to the ranks."""
    make_greedy(model, tokenizer)
    size, longest = cfg.eval.batch_size, cfg.data.max_length
    if positions := getattr(model.config, "max_position_embeddings", None):
        longest = min(longest, max(1, positions - cfg.eval.max_new_tokens))
    ids = [encode_prompt(prompt, cfg.data, tokenizer, longest) for prompt in prompts]
    starts = range(0, len(ids), size)[accelerator.process_index :: accelerator.num_processes]
    mine = [
        (start, generate(model, tokenizer, ids[start : start + size], cfg.eval.max_new_tokens, dtype))
        for start in track(starts, "answers", "batch", len(starts), shown=accelerator.is_main_process)
    ]
    answers = [answer for _, batch in sorted(gather_object(mine)) for answer in batch]
    return [
        without_rest(prompt_tokens(prompt, cfg.data, tokenizer)[1], answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _write(results: dict[str, Any], run_dir: Path) -> None:
    write_json(run_dir / "eval.json", results)
    write_whole(run_dir / "samples.md", _samples_page(results))
    plots.plot_evaluation(run_dir)


def _track(cfg: BaseConfig, results: dict[str, Any]) -> None:
    """The figures of both models, as metrics of the run that trained the one."""
    run_dir = Path(cfg.output_dir)
    metrics = {
        f"eval/{role}/{key}": results[role][key]
        for role in ("base", "fine_tuned")
        for _, key, _ in report.FIGURES
        if key in results[role]
    }
    step = report.read_json(run_dir / "summary.json").get("steps", 0)
    log_results(cfg, run_dir, metrics, step, [run_dir / name for name in ("eval.json", "samples.md", "plots/eval.png")])


def _samples_page(results: dict[str, Any]) -> str:
    lines = [f"# {results['project']}: held-out samples", ""]
    lines += [f"Base: `{results['base']['model']}`. Fine-tuned: `{results['fine_tuned']['model']}`.", ""]
    for number, sample in enumerate(results["samples"], 1):
        lines += [f"## {number}", ""]
        for label, key in SAMPLE_PARTS:
            text = "\n".join(textwrap.fill(line, 96) for line in sample[key].strip().splitlines()) or "(blank)"
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            lines += [f"**{label}**", "", f"{fence}text", text, fence, ""]
    return "\n".join(lines)


def _print(results: dict[str, Any], run_dir: Path) -> None:
    print()
    report.print_table(report.evaluation_rows(results))
    for number, sample in enumerate(results["samples"], 1):
        print(f"\nsample {number}")
        for label, key in SAMPLE_PARTS:
            line = " ".join(sample[key].split()) or "(blank)"
            # Cut within a word if need be: a model may write no spaces.
            print(f"  {label:<11} {line if len(line) <= 84 else f'{line[:82]} …'}")
    print(f"\nin {run_dir}:\n  eval.json  samples.md  plots/eval.png")
