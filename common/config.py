"""Typed configuration: dataclass defaults < YAML file < `key=value` on the command line.

The same keys mean the same thing in all seven projects. A project adds its own section by subclassing `BaseConfig` at
the top of its `train.py`. Every mistake is found here, before anything is downloaded, and is reported with its key.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import gc
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common import errors, launched
from common.errors import UserError
from common.files import write_whole

REPOSITORY = Path(__file__).resolve().parent.parent


def key(default: Any, help: str, *, choices: tuple[str, ...] = (), minimum: float | None = None) -> Any:
    """A dataclass field that knows its help text, its choices and its smallest value."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass
class ModelConfig:
    """Section `model`: which weights to start from."""

    name: str = key("tiny:qwen2", "Hub id, local folder, smollm2 (from a package), or tiny:qwen2|opt|llama|bloom")
    revision: str = key("main", "branch, tag or commit of the model on the Hub")
    random_weights: bool = key(False, "start from random weights of the real shapes (for measurements without the Hub)")


@dataclass
class DataConfig:
    """Section `data`: which rows, and how they become sequences of tokens."""

    name: str = key("pydoc", "Hub id, folder, file (.jsonl, .csv, .parquet …; see the README), or pydoc (embedded)")
    subset: str = key("", "configuration of a Hub dataset that has several")
    split: str = key("train", "split that training rows come from")
    eval_split: str = key("", "split that held-out rows come from; empty: rows of `split` that never train")
    format: str = key("text", "what a row is", choices=("text", "prompt-response", "messages"))
    text_column: str = key("text", "column with the text (format: text)")
    prompt_column: str = key("prompt", "column with the prompt (format: prompt-response)")
    response_column: str = key("response", "column with the response (format: prompt-response)")
    messages_column: str = key("messages", "column with the list of role/content turns (format: messages)")
    prompt_template: str = key("{prompt}\n", "prompt as the model sees it; {prompt} or any {column} of the data")
    date: str = key("2024-07-26", "what a chat template takes for today's date (YYYY-MM-DD), on whatever day it is")
    max_length: int = key(256, "tokens a training sequence has at most", minimum=2)
    packing: str = key(
        "none",
        "wrapped: documents joined by EOS, cut into full blocks; documents: whole ones side by side in blocks, none "
        "attends to another; none: padded",
        choices=("wrapped", "documents", "none"),
    )
    train_rows: int = key(0, "use at most this many rows for training, drawn at random; 0: all", minimum=0)
    eval_rows: int = key(200, "rows held out for evaluation", minimum=1)


@dataclass
class TrainConfig:
    """Section `train`: batch, schedule, AdamW, precision, and what trades compute for memory."""

    global_batch_size: int = key(16, "sequences an optimizer step sees, over all ranks and micro-batches", minimum=1)
    micro_batch_size: int = key(4, "sequences a rank puts through the model at once", minimum=1)
    max_steps: int = key(0, "optimizer steps; 0: as many as `epochs` gives", minimum=0)
    epochs: float = key(1.0, "passes over the training rows (when max_steps is 0)", minimum=0)
    learning_rate: float = key(2e-5, "peak learning rate of AdamW", minimum=0)
    warmup_steps: int = key(0, "steps of linear warm-up", minimum=0)
    lr_schedule: str = key("cosine", "after the warm-up", choices=("constant", "linear", "cosine"))
    weight_decay: float = key(0.0, "decoupled weight decay of the matrices (norms and biases have none)", minimum=0)
    max_grad_norm: float = key(1.0, "clip the global gradient norm to this; 0: measure it, do not clip", minimum=0)
    precision: str = key("auto", "auto: bf16 from compute capability 8.0, fp16 below, fp32 on CPU",
                         choices=("auto", "fp32", "fp16", "bf16"))  # fmt: skip
    activation_checkpointing: bool = key(False, "recompute each layer in the backward: less memory, 1/3 more compute")
    compile: bool = key(False, "torch.compile each decoder layer: faster after about a minute")


@dataclass
class EvalConfig:
    """Section `eval`: the held-out loss while training, and what `eval.py` compares."""

    every: int = key(0, "evaluate on the held-out rows every N steps; 0: before and after only", minimum=0)
    batch_size: int = key(8, "sequences a rank evaluates at once", minimum=1)
    model: str = key("", "eval.py: fine-tuned model, a folder or Hub id; empty: output_dir/model")
    samples: int = key(4, "eval.py: samples to print and write to samples.md", minimum=0)
    generate_rows: int = key(32, "eval.py: prompts answered for ROUGE-L and exact match", minimum=0)
    max_new_tokens: int = key(64, "eval.py: tokens a generated answer has at most", minimum=1)


@dataclass
class CheckpointConfig:
    """Section `checkpoint`: when to save, how many to keep, where to resume."""

    every: int = key(0, "save every N steps; 0: at the end and at a clean stop only", minimum=0)
    keep: int = key(1, "checkpoints kept on disk", minimum=1)
    resume: str = key("auto", "auto: from the newest complete checkpoint in output_dir; a checkpoint's path; never")


@dataclass
class TrackingConfig:
    """Section `tracking`: the experiment tracker."""

    backend: str = key("none", "experiment tracker", choices=("mlflow", "wandb", "none"))
    project: str = key("multi-gpu-fine-tuning", "MLflow experiment or W&B project")


@dataclass
class HubConfig:
    """Section `hub`: uploads to the Hugging Face Hub."""

    repo_id: str = key("", "upload model/ to this Hub repository at the end; empty: no upload")
    private: bool = key(True, "create that repository as private")
    push_checkpoints: bool = key(False, "upload the newest checkpoint as well, also when a run is interrupted")


@dataclass
class ExportConfig:
    """Section `export`: the form of model/, which a run leaves behind."""

    dtype: str = key("fp32", "type of model/'s weights; fp16, bf16: half the size, rounded from the fp32 that trained",
                     choices=("fp32", "fp16", "bf16"))  # fmt: skip


@dataclass
class RuntimeConfig:
    """Section `runtime`: limits of memory and time, and whether a CPU will do."""

    gpu_memory_limit_gib: float = key(0.0, "let each process use at most this much GPU memory; 0: all of it", minimum=0)
    max_hours: float = key(0.0, "save and stop cleanly after this many hours; 0: no limit", minimum=0)
    timeout_minutes: float = key(10.0, "end the run if a rank has not answered for this long", minimum=0.1)
    allow_cpu: bool = key(True, "train on a CPU if there is no GPU; false: refuse, unless the model is a tiny: one")


@dataclass
class BaseConfig:
    """All keys that the seven projects share; each project adds its own section in a subclass."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = key(42, "seeds the tiny model's weights, the order of the data and every random number", minimum=0)
    output_dir: str = key("", "run folder; empty: runs/<project>/<name of the config file> in the repository")


C = TypeVar("C", bound=BaseConfig)


def parse_config(config_class: type[C], script: str, argv: list[str] | None = None, *, run_name: str = "") -> C:
    """The configuration for `script`, from `[--config FILE] [key=value …]` (`sys.argv` when `argv` is None).

    FILE is a path, or the name of a file next to the script; the default is the `config.yaml` next to the script,
    whatever the current folder holds. The run folder is named after FILE unless `run_name` is set. Also settles what a
    launcher has set in the environment (`launched.settle`). With `--check`, ends the process after the check. Raises
    `UserError` for a missing or broken file, an unknown key, a wrong type, a bad value, a contradiction.
    """
    if sys.flags.optimize > 1:
        raise UserError("Python runs with -OO, without the docstrings that transformers reads: unset PYTHONOPTIMIZE=2")
    folder = Path(script).resolve().parent
    parser = argparse.ArgumentParser(
        prog=f"{folder.name}/{Path(script).name}",
        usage="%(prog)s [--config FILE] [--check] [key=value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys:\n" + describe_keys(config_class),
        allow_abbrev=False,
    )
    file_help = "YAML file: a path, or a name next to the script (default: config.yaml there)"
    parser.add_argument("--config", default=str(folder / "config.yaml"), metavar="FILE", help=file_help)
    parser.add_argument("--check", action="store_true", help="check the settings, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it; it is in LOCAL_RANK too
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    arguments, unknown = parser.parse_known_intermixed_args(argv)  # --config may stand between the settings
    for flag in unknown:
        raise UserError(f"unknown option {flag}: settings are written key=value, without dashes (see --help)")
    if arguments.check:
        launched.forget()  # by launch.sh, before its launcher sets them
    else:
        launched.settle()

    path = next((p for p in (Path(arguments.config), folder / arguments.config) if p.is_file()), None)
    if path is None:
        present = ", ".join(sorted(p.name for p in folder.glob("*.yaml")))
        raise UserError(f"--config {arguments.config}: no such file (next to the script there are: {present})")
    config = load_config(config_class, path, arguments.overrides)
    paths = ((config, "output_dir"), (config.model, "name"), (config.data, "name"), (config.eval, "model"))
    for section, name in (*paths, (config.checkpoint, "resume")):
        if getattr(section, name).startswith("~"):  # YAML does not expand it, nor does a shell after every `=`
            setattr(section, name, str(Path(getattr(section, name)).expanduser()))
    if not config.output_dir:
        config.output_dir = str(REPOSITORY / "runs" / folder.name / (run_name or path.stem))
    if arguments.check:
        sys.exit()
    return config


def check_command_line(config_class: type[BaseConfig], script: str) -> None:
    """Answer `--help`, `--check` and a wrong setting right away.

    A script calls this before it imports torch, which takes seconds; a quarter fewer without garbage collection, since
    what is imported stays. `errors.run` turns it on again.
    """
    with errors.reported():
        parse_config(config_class, script)
    gc.disable()


def load_config(config_class: type[C], path: Path, overrides: list[str]) -> C:
    """Merge the defaults of `config_class`, the YAML at `path` and the `key=value` strings, then validate."""
    try:
        from_file = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        mapping = OmegaConf.is_dict(from_file)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{path}{place}: not valid YAML: {problem}") from None
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not mapping:
        raise UserError(f"{path}: must hold `key: value` lines")
    known = {name: f for name, f, _ in walk(config_class)}
    from_command_line = OmegaConf.create()
    for override in overrides:
        name, equals, value = override.partition("=")
        if not name or not equals:
            raise UserError(f"{override!r}: settings are written key=value, for example train.max_steps=20")
        try:
            if name in known and _is_text(known[name]):
                OmegaConf.update(from_command_line, name, _typed_text(value))
            else:
                from_command_line.merge_with_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"command line: {override}: {str(error).splitlines()[0]}") from None

    merged = OmegaConf.structured(config_class)
    for source, values in ((str(path), from_file), ("command line", from_command_line)):
        _refuse_unknown_keys(source, OmegaConf.to_container(values, resolve=False), known)
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise UserError(f"{source}: {error.full_key or '?'}: {str(error).splitlines()[0]}") from None
    try:
        config: C = OmegaConf.to_object(merged)  # also resolves ${interpolations}
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key or '?'}: {str(error).splitlines()[0]}") from None
    for name, f in known.items():
        _check_value(name, get(config, name), f.metadata)
    if config.seed >= 2**32:
        raise UserError(f"seed={config.seed}: NumPy's seeds are below {2**32}")
    if config.train.max_steps == 0 and config.train.epochs == 0:
        raise UserError("train.max_steps and train.epochs are both 0: set one of them")
    try:
        datetime.date.fromisoformat(config.data.date)
    except ValueError:
        raise UserError(f"data.date={config.data.date} is not a date: write it as 2024-07-26") from None
    if config.data.format == "prompt-response" and "{" not in config.data.prompt_template:
        raise UserError("data.prompt_template names no column: write {prompt} where the prompt belongs")
    return config


def walk(config_class: type, prefix: str = "") -> list[tuple[str, dataclasses.Field, Any]]:
    """Every leaf key of a config class as (dotted name, dataclass field, default)."""
    leaves = []
    instance = config_class()
    for f in dataclasses.fields(config_class):
        value = getattr(instance, f.name)
        if dataclasses.is_dataclass(value):
            leaves += walk(type(value), f"{prefix}{f.name}.")
        else:
            leaves.append((prefix + f.name, f, value))
    return leaves


def describe_keys(config_class: type) -> str:
    """The help text: one line per key, with its default, choices and meaning."""
    lines = []
    for name, f, default in walk(config_class):
        choices = f" ({'|'.join(f.metadata['choices'])})" if f.metadata.get("choices") else ""
        lines.append(f"  {name}={default!r}  {f.metadata.get('help', '')}{choices}")
    return "\n".join(lines)


def get(config: Any, dotted: str) -> Any:
    """`get(cfg, "train.max_steps")`."""
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def flatten(config: BaseConfig) -> dict[str, Any]:
    """Dotted key to value, for trackers."""
    return {name: get(config, name) for name, _, _ in walk(type(config))}


def save_config(config: BaseConfig, path: Path) -> None:
    """Write the resolved configuration; it can be passed to `--config` again."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def accumulation_steps(config: BaseConfig, world_size: int, shares: str = "processes") -> int:
    """Micro-batches a rank runs in one optimizer step: global batch / (micro-batch × ranks).

    `shares` names what the batch is split over, if that is not the processes.

    Raises `UserError` if that is not an integer: the global batch is the user's, and is never rounded.
    """
    per_pass = config.train.micro_batch_size * world_size
    steps, rest = divmod(config.train.global_batch_size, per_pass)
    if rest or not steps:
        fitting = f"{steps * per_pass} or {(steps + 1) * per_pass}" if steps else f"{per_pass}"
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"× {shares} = {config.train.micro_batch_size} × {world_size}: set it to {fitting}, "
            f"or change train.micro_batch_size"
        )
    return steps


def _refuse_unknown_keys(source: str, values: Any, known: dict[str, dataclasses.Field], prefix: str = "") -> None:
    sections = {".".join(name.split(".")[:depth]) for name in known for depth in range(1, name.count(".") + 1)}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if dotted in sections:
            if not isinstance(value, dict):
                raise UserError(f"{source}: {dotted} is a section, not a value: set one of its keys, as in {dotted}.…=")
            _refuse_unknown_keys(source, value, known, f"{dotted}.")
        elif dotted not in known:
            while isinstance(value, dict) and value:  # the section is misspelt: name the whole key
                name, value = next(iter(value.items()))
                dotted += f".{name}"
            near = difflib.get_close_matches(dotted, [*known, *sections], n=1, cutoff=0.6)
            if str(name).lower().endswith(("token", "api_key")) and not any("token" in k for k in near):
                raise UserError(f"{source}: {dotted}: a secret is not a setting; put it in HF_TOKEN or WANDB_API_KEY")
            same_leaf = [k for k in known if k.split(".")[-1] == str(name)]
            near = difflib.get_close_matches(dotted, same_leaf, n=1, cutoff=0) or near
            hint = f"; did you mean {near[0]}?" if near else " (see --help for all keys)"
            raise UserError(f"{source}: unknown key {dotted}{hint}")
        elif _is_text(known[dotted]) and not isinstance(value, str):
            # YAML reads a commit such as 0123456 as a number, and its text would be another one.
            raise UserError(f'{source}: {dotted} is {value}, not text: write it in quotes (nothing: "")')


def _is_text(f: dataclasses.Field) -> bool:
    return isinstance(f.default, str)


def _typed_text(value: str) -> str:
    """A text of the command line as it was typed; in quotes it is YAML's, so that "\\n" is a new line."""
    if value == "null":
        return ""
    return yaml.safe_load(value) if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _check_value(name: str, value: Any, metadata: Any) -> None:
    choices, minimum = metadata.get("choices"), metadata.get("minimum")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise UserError(
            f"{name}={value} is not one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value} is not a finite number")
    if minimum is not None and value < minimum:
        raise UserError(f"{name}={value} is too small: the least is {minimum:g}")
