"""`model/README.md`: the model card, with front matter that the Hugging Face Hub reads.

The training writes it, and `eval.py` puts its figures into it.
"""

from __future__ import annotations

import math
import re
from string import Formatter
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common import report, smollm2
from common.config import BaseConfig
from common.hub import is_hub_id

FROM_BASE = ("language", "license", "license_name", "license_link")  # of the base's card: they hold for what it became
LIMITATIONS = """\
- It was measured on held-out rows of its training data and on nothing else: other texts, other languages and safety
  were not looked at.
- One seed, one set of hyperparameters. Training on narrow data can cost abilities that the base model had.
- What the base model gets wrong (false statements, bias), this one may get wrong too."""


def model_card(cfg: BaseConfig, summary: dict, environment: dict | None = None, base_card: str = "") -> str:
    """The README.md of a trained model.

    `summary` and `environment` are the run's `summary.json` and `environment.json`, `base_card` is the README.md of the
    base model: licence and language come from there. What they do not have is left out.
    """
    base = smollm2.HUB_ID if cfg.model.name == smollm2.NAME else cfg.model.name
    ours = {"license": smollm2.LICENSE, "language": ["en"]} if base == smollm2.HUB_ID else {}
    theirs = ModelCard(base_card, ignore_metadata_errors=True).data.to_dict() if base_card else {}
    project = summary.get("project", "")
    name = cfg.hub.repo_id.rpartition("/")[2] or f"{base.rpartition('/')[2].replace(':', '-')}-fine-tuned"
    loss = summary.get("eval_loss_after")
    data = ModelCardData(
        **{key: value for key, value in (theirs | ours).items() if key in FROM_BASE},
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if is_hub_id(base) else None,
        datasets=[cfg.data.name] if is_hub_id(cfg.data.name) else None,
        tags=["fine-tuned", "multi-gpu", *filter(None, [project])],
        **({} if loss is None else {"model_name": name, "eval_results": _results({"loss": loss}, cfg.data.name)}),
    )
    sections = {
        f"# {name}": f"`{base}`, fully fine-tuned on `{cfg.data.name}`" + (f" with `{project}`." if project else "."),
        "## Results": _results_before_and_after(summary),
        "## Use": _use(cfg),
        "## Training": _table(_training(cfg, summary, environment or {})),
        "## Limitations": LIMITATIONS
        + ("\n- The licence of the base model holds: see there." if data.base_model and not data.license else ""),
    }
    body = "\n\n".join(f"{heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def with_evaluation(card: str, results: dict[str, Any]) -> str:
    """`card` with the figures of an evaluation, `eval.json`, in its front matter and in its section "Results"."""
    parsed = ModelCard(card)
    data = results["settings"]["data"]
    parsed.data.model_name = parsed.text.strip().partition("\n")[0].removeprefix("# ")
    parsed.data.eval_results = _results(results["fine_tuned"], data)
    heading, *rows = report.evaluation_rows(results)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] + ["---:"] * (len(heading) - 1), *rows))
    text = f"## Results\n\nOn `{data}`, by `eval.py` of `{results['project']}`:\n\n{table}\n\n"
    until_use = re.compile(r"(^## Results\n.*?)?(?=^## Use$)", re.DOTALL | re.MULTILINE)  # the section may be missing
    body = until_use.sub(lambda _: text, parsed.text, count=1)
    return f"---\n{parsed.data.to_yaml()}\n---\n{body}"


def _results(figures: dict[str, Any], data: str) -> list[EvalResult]:
    """The model-index: what was measured on held-out rows of `data`."""
    measured = {"perplexity": math.exp(figures["loss"])} | figures
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=data if is_hub_id(data) else "custom",
            dataset_name=data,
            dataset_split="held out of training",
            metric_type=key,
            metric_name=label.rstrip(" ↓↑"),
            metric_value=round(measured[key], 5),
        )
        for label, key, _ in report.FIGURES
        if measured.get(key) is not None
    ]


def _results_before_and_after(summary: dict) -> str:
    before, after = summary.get("eval_loss_before"), summary.get("eval_loss_after")
    if after is None:
        return ""
    perplexities = [None if loss is None else math.exp(loss) for loss in (before, after)]
    rows = {"held-out loss (nats)": [before, after], "perplexity": perplexities}
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    for name, figures in rows.items():
        lines.append(f"| {name} | {' | '.join('–' if value is None else f'{value:,.4f}' for value in figures)} |")
    return "\n".join(lines)


def _use(cfg: BaseConfig) -> str:
    where = cfg.hub.repo_id or "path/to/model"
    call, answer = 'generate("We show that", max_new_tokens=64)', '[0]["generated_text"]'
    if cfg.data.format == "messages":
        call = 'generate([{"role": "user", "content": "Hello!"}], max_new_tokens=64)'
        answer += '[-1]["content"]'
    elif cfg.data.format == "prompt-response":  # as the prompts of the training
        columns = dict.fromkeys(name for _, name, _, _ in Formatter().parse(cfg.data.prompt_template) if name)
        filled = ", ".join(f'{name}="..."' for name in columns)
        call = f"generate({cfg.data.prompt_template!r}.format({filled}), max_new_tokens=64)"
    lines = ["from transformers import pipeline", "", f'generate = pipeline("text-generation", "{where}")']
    return "\n".join(["```python", *lines, f"print({call}{answer})", "```"])


def _training(cfg: BaseConfig, summary: dict, environment: dict) -> dict[str, str | None]:
    t, versions = cfg.train, environment.get("versions", {})
    speed, seconds = summary.get("tokens_per_second"), summary.get("seconds")
    shown = ("torch", "transformers", "deepspeed", "ray", "llm-foundry", "mosaicml")
    return {
        "optimizer steps": str(summary["steps"]) if summary.get("steps") else None,
        "global batch": f"{t.global_batch_size} sequences of at most {cfg.data.max_length} tokens",
        "optimizer": f"AdamW, learning rate {t.learning_rate:g}, {t.lr_schedule}, {t.warmup_steps} warm-up steps, "
        f"weight decay {t.weight_decay:g}, gradient norm clipped to {t.max_grad_norm:g}",
        "precision": environment.get("precision", "").partition(":")[0] or None,
        "weights in model/": cfg.export.dtype,
        "seed": str(cfg.seed),
        "hardware": report.devices(environment) if environment else None,
        "time": f"{seconds / 60:,.1f} minutes, {speed:,.0f} tokens/s" if seconds and speed else None,
        "software": ", ".join(f"{name} {versions[name]}" for name in shown if name in versions) or None,
    }


def _table(facts: dict[str, str | None]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])
