"""The held-out loss during training, and `eval.py`: the base model against the fine-tuned one.

Both use the same rows and the same functions, so that the losses of `eval.json` are those of the training's
`summary.json`. Every figure is the same on any number of processes: batches are cut before they are dealt out, and sums
and counts are reduced, never means.
"""

from __future__ import annotations

import filecmp
import importlib
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, release_memory
from torch import Tensor
from transformers import GenerationConfig

from common import report
from common.config import BaseConfig, DataConfig, ModelConfig, get, load_config
from common.data import (
    Prompt,
    TokenizedRows,
    collate,
    describe_counts,
    load_rows,
    prompt_and_reference,
    prompt_tokens,
    tokenize,
)
from common.errors import UserError
from common.files import check_writable, write_whole
from common.loss import IGNORE, CausalLMLoss
from common.models import load_model, load_tokenizer, use_fused_attention
from common.progress import track
from common.runtime import (
    check_gpu,
    check_process_count,
    describe_environment,
    limit_gpu_memory,
    only_main_shows_progress,
    resolve_precision,
)
from common.tracking import log_results

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MOST_PROMPT_CHARACTERS = 160  # of a text that is to be continued: two lines on a screen
SAMPLE_PARTS = [("prompt", "prompt"), ("reference", "reference"), ("base", "base"), ("fine-tuned", "fine_tuned")]


def held_out_batches(
    rows: TokenizedRows, batch_size: int, pad_id: int, rank: int = 0, world_size: int = 1
) -> list[dict[str, Tensor]]:
    """One rank's batches {"input_ids", "labels"}, int64 [batch, longest]; over all ranks every row is in one of them.

    Rows are sorted by length, so that little is padded, and cut into batches that are dealt out whole, longest first.
    A batch is thus the same tensor, with the same loss to the last bit, whichever rank gets it. Every other round is
    dealt in reverse, so that no rank always gets the longest. Every rank gets the same number of batches, since a
    sharded model's forward pass is a collective: where the last round is short, the rest get one row without targets.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    batches = [
        collate([rows[i] for i in order[at : at + batch_size]], pad_id) for at in range(0, len(rows), batch_size)
    ]
    shortest = collate([rows[order[-1]]], pad_id)
    filler = {**shortest, "labels": torch.full_like(shortest["labels"], IGNORE)}
    batches += [filler] * (-len(batches) % world_size)
    rounds = [batches[at : at + world_size] for at in range(0, len(batches), world_size)]
    return [batch[-1 - rank if turn % 2 else rank] for turn, batch in enumerate(rounds)]


@torch.no_grad()  # not inference_mode: FSDP's gathered parameters would become inference tensors and spoil training
def evaluate(
    model: CausalLMLoss,
    batches: Sequence[dict[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    progress: str = "",
) -> Tensor:
    """This rank's sums over `batches`, float64 [3] on `device`: token losses in nats, targets, targets predicted right.

    The caller reduces them over the ranks. Computes under autocast of `dtype` unless that is fp32. `progress` is the
    label of a progress bar; empty: none.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in track(batches, progress, "batch", len(batches), shown=bool(progress)):
            total += model(batch["input_ids"].to(device), batch["labels"].to(device), statistics=True)
    model.train(was_training)
    return total


def predicted_bytes(rows: TokenizedRows, tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes of the text that the targets of `rows` spell; special tokens, as EOS, spell none."""
    texts = (
        tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for labels in (row["labels"][1:] for row in rows)  # a sequence's first token is predicted from nothing
    )
    return sum(len(text.encode()) for text in texts)


def figures(sums: Tensor, text_bytes: int) -> dict[str, float]:
    """Loss (nats a token), perplexity, token accuracy and bits per byte from the reduced sums of `evaluate`.

    Bits per byte divides by the bytes of the text, which no tokenizer changes, where the loss divides by its tokens
    (The Pile, https://arxiv.org/abs/2101.00027, section 3.1). Raises `UserError` if the loss is not finite.
    """
    total, targets, right = sums.tolist()
    loss = total / targets
    if not math.isfinite(loss):
        raise UserError(
            f"the held-out loss is {loss}: if the base model's is, set train.precision=fp32 (fp16 overflows in some "
            f"models); if only the fine-tuned model's is, its training diverged: lower train.learning_rate"
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # above 709 a float overflows
        "token_accuracy": right / targets,
        "bits_per_byte": total / math.log(2) / max(text_bytes, 1),
        "tokens": int(targets),
        "bytes": text_bytes,
    }


def questions(rows: Dataset, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Prompt, str]]:
    """(prompt, reference) of each row; of a text, its beginning and how it continues."""
    if data.format != "text":
        return [prompt_and_reference(row, data, tokenizer) for row in rows]
    parts = [_split_text(row[data.text_column].strip()) for row in rows]
    return [(Prompt(*part), part[1]) for part in parts]


def _split_text(text: str) -> tuple[str, str]:
    """Cut at the end of a word, at most half-way through: by characters, so that all tokenizers get the same prompt."""
    ends = [space.start() for space in re.finditer(r"\s", text[: min(MOST_PROMPT_CHARACTERS, len(text) // 2)])]
    cut = ends[-1] if ends else len(text) // 2
    return text[:cut], text[cut:]


def encode_prompt(prompt: Prompt, data: DataConfig, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[int]:
    """Token ids of `prompt` as training has them; of more than `longest` tokens the last, where the answer begins."""
    ids, _ = prompt_tokens(prompt, data, tokenizer)
    return ids[-longest:] or [tokenizer.eos_token_id]  # an empty prompt starts where a packed document would


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    max_new_tokens: int,
    dtype: torch.dtype,
) -> list[str]:
    """The greedy continuation of each prompt (token ids), as one batch, without the prompt and special tokens."""
    longest = max(map(len, prompts))
    # On the left, so that every row's new tokens follow its prompt; the mask also gives the positions.
    ids = [[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        output = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def make_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set what `model.generate` does: the likeliest token each time, up to any of the model's end tokens.

    The model's own generation settings are dropped: a chat model's repetition penalty or temperature would otherwise
    apply to it and not to what was trained from it.
    """
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id)


def answer_scores(answers: list[str], references: list[str]) -> dict[str, float]:
    """Mean ROUGE-L F1 (Lin 2004, https://aclanthology.org/W04-1013) and share of answers equal to the reference."""
    from rouge_score.rouge_scorer import RougeScorer  # here: it takes seconds to import, and training needs none of it

    scorer = RougeScorer(["rougeL"])
    pairs = [(reference.strip(), answer.strip()) for reference, answer in zip(references, answers, strict=True)]
    return {
        "rouge_l": sum(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs) / len(pairs),
        "exact_match": sum(reference == answer for reference, answer in pairs) / len(pairs),
    }


def compare(cfg: BaseConfig, *, project: str) -> dict[str, Any]:
    """Base model (`cfg.model`) against fine-tuned (`cfg.eval.model`, else `output_dir/model`) on the held-out split.

    On one process or on the processes of a launcher. Writes `eval.json`, `samples.md` and `plots/eval.png` into
    `cfg.output_dir`, prints a table and samples, and returns what `eval.json` holds. Raises `UserError` where there is
    no fine-tuned model, or its training's settings would make the comparison wrong, for a package that is missing, and
    for what loading models and data raises.
    """
    check_process_count()
    models = {"base": cfg.model, "fine_tuned": fine_tuned_model(cfg, project)}
    notes = check_training(cfg, Path(models["fine_tuned"].name))
    check_needs(cfg)
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=cfg.runtime.timeout_minutes))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[timeout])
    only_main_shows_progress(accelerator.is_main_process)
    for note in notes:
        accelerator.print(f"note: {note}")
    check_gpu(accelerator.device)
    limit_gpu_memory(cfg.runtime, accelerator.device)
    dtype, reason = resolve_precision(cfg.train.precision, accelerator.device)
    started = time.perf_counter()
    with accelerator.local_main_process_first():  # one process of a machine downloads and converts, the others read
        _, held_out = load_rows(cfg.data, cfg.seed)

    measured, answers = {}, {}
    for role, source in models.items():
        accelerator.print(f"evaluating {role.replace('_', '-')}: {source.name}")
        try:
            measured[role], answers[role] = _measure(source, cfg, held_out, accelerator, dtype)
        except torch.OutOfMemoryError as error:
            smaller = (
                f"set eval.batch_size={cfg.eval.batch_size // 2}" if cfg.eval.batch_size > 1 else "use more memory"
            )
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
        "environment": describe_environment(accelerator.num_processes, reason),
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
        _track(cfg, results)
        _print(results, Path(cfg.output_dir))
    accelerator.end_training()
    return results


def check_needs(cfg: BaseConfig) -> None:
    """Raise `UserError` for what only the end of an evaluation would miss: packages, and a folder to write to."""
    scored = cfg.data.format != "text" and cfg.eval.generate_rows
    needed = {"matplotlib": "the plots"} | ({"rouge_score.rouge_scorer": "ROUGE-L"} if scored else {})
    for package, purpose in needed.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            name = package.partition(".")[0]
            without = ", or set eval.generate_rows=0 to go without" if name == "rouge_score" else ""
            raise UserError(f"cannot make {purpose} without {name} ({error}): pip install {name}{without}") from None
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
    """What to know of the run whose `model/` this is; nothing where the model does not lie in a run folder.

    Raises `UserError` where rows that it trained on would pass for held out, or it began with another base model.
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
        notes += [f"{run_dir} goes on from an earlier end, whose model this is; it is at step {summary['steps']} now"]
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
    sums = accelerator.reduce(evaluate(CausalLMLoss(model), batches, device, dtype, progress))
    # A folder is named from the run folder, since the record may be published and the disk it was on may not.
    name = os.path.relpath(source.name, cfg.output_dir) if Path(source.name).is_dir() else source.name
    measured = {
        "model": name,
        "rows": len(rows),
        "data": rows.counts,
        **figures(sums, predicted_bytes(rows, tokenizer)),
    }

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
    """A generated answer for each prompt, on every process; here, too, whole batches are dealt out to the ranks."""
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


def without_rest(rest: str, answer: str) -> str:
    """`answer` without the end of the prompt that it begins with; decoding may have dropped a space in front."""
    return answer.lstrip().removeprefix(rest.lstrip()) if rest else answer


def _write(results: dict[str, Any], run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "eval.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    write_whole(run_dir / "samples.md", _samples_page(results))
    report.plot_evaluation(run_dir)


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
            print(f"  {label:<11} {_one_line(sample[key], 84) or '(blank)'}")
    print(f"\nin {run_dir}:\n  eval.json  samples.md  plots/eval.png")


def _one_line(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters; cut within a word if need be: a model may write no spaces."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 2]} …"
