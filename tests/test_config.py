"""Configuration: what wins over what, and that every mistake is one line that names its key and what to set."""

import gc
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import REPOSITORY, refused

from common import errors
from common.config import (
    BaseConfig,
    ModelConfig,
    TrainConfig,
    accumulation_steps,
    check_command_line,
    flatten,
    key,
    load_config,
    parse_config,
    save_config,
    walk,
)

TRAIN_PY = str(REPOSITORY / "pytorch-ddp" / "train.py")


@dataclass
class ExtraConfig:
    stages: list[int] = field(default_factory=lambda: [1, 2])


@dataclass
class ProjectConfig(BaseConfig):
    """As a project extends the common keys."""

    extra: ExtraConfig = field(default_factory=ExtraConfig)
    flavour: str = key("plain", "how 100% of it tastes", choices=("plain", "sweet"))


@pytest.fixture
def load(tmp_path):
    """load(yaml text, *overrides) -> config"""

    def load(text: str = "", *overrides: str, config_class=BaseConfig):
        path = tmp_path / "test.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(config_class, path, list(overrides))

    return load


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A project's script with two configurations next to it; the working directory is another one."""
    folder, elsewhere = tmp_path / "some-project", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "smoke.yaml").write_text("seed: 2\n")
    monkeypatch.chdir(elsewhere)
    return str(folder / "train.py")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(load):
    config = load("train: {max_steps: 5, micro_batch_size: 2}\nseed: 7\n", "train.max_steps=9", "train.max_steps=10")
    assert config.train.max_steps == 10, "the last override of a key counts"
    assert (config.train.micro_batch_size, config.seed) == (2, 7)
    assert config.train.global_batch_size == TrainConfig.global_batch_size
    assert config.model == ModelConfig()
    assert load("") == BaseConfig()
    assert isinstance(config.train, TrainConfig), "sections are dataclasses, not dictionaries"


def test_a_project_adds_its_own_section(load):
    config = load("extra: {stages: [3]}\n", "flavour=sweet", config_class=ProjectConfig)
    assert (config.extra.stages, config.flavour) == ([3], "sweet")
    assert load("", "extra.stages=[4,5]", config_class=ProjectConfig).extra.stages == [4, 5]
    with refused("flavour=sour", "plain, sweet"):
        load("flavour: sour", config_class=ProjectConfig)


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("train.learning_rate=1e-5", "train.learning_rate", 1e-5),
        ("train.epochs=3", "train.epochs", 3.0),
        ("train.compile=true", "train.compile", True),
        ("train.compile=False", "train.compile", False),
        ("hub.repo_id=", "hub.repo_id", ""),
        ("hub.repo_id=null", "hub.repo_id", ""),
        ("output_dir=runs/a b=c", "output_dir", "runs/a b=c"),
        ("data.prompt_template=Q: {prompt} = ?", "data.prompt_template", "Q: {prompt} = ?"),
        ("data.prompt_template={prompt}\n", "data.prompt_template", "{prompt}\n"),
        ('data.prompt_template="{prompt}\\n"', "data.prompt_template", "{prompt}\n"),
        ("data.prompt_template=# {prompt}", "data.prompt_template", "# {prompt}"),
        ("data.prompt_template='{prompt}' said \"he\"", "data.prompt_template", "'{prompt}' said \"he\""),
        ("data.prompt_template=[INST] {prompt} [/INST]\t\U0001f600", "data.prompt_template",
         "[INST] {prompt} [/INST]\t\U0001f600"),
        ("model.name=C:\\models\\a", "model.name", "C:\\models\\a"),
        # Commits that YAML takes for an octal number, a float or infinity.
        ("model.revision=0123456", "model.revision", "0123456"),
        ("model.revision=1e5", "model.revision", "1e5"),
        ("model.revision=12e4567", "model.revision", "12e4567"),
        ("tracking.project=on", "tracking.project", "on"),
        ("tracking.project=${model.name}-${seed}", "tracking.project", "tiny:qwen2-42"),
    ],
)  # fmt: skip
def test_values_of_the_command_line_arrive_as_typed(load, override, name, expected):
    value = flatten(load("", override))[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("value", ["0123456", "1e5", "yes", "null", "2024-01-01", "1:30", "a: b #c", "{x}\n", "- 1"])
def test_the_saved_config_loads_again_to_the_same_config(tmp_path, load, value):
    config = load("", f"model.revision={value}x", "train.learning_rate=1e-5", "train.compile=true", "train.epochs=0.1")
    config.model.revision = value
    save_config(config, tmp_path / "config.yaml")
    assert load_config(BaseConfig, tmp_path / "config.yaml", []) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("bad.key=1", ["unknown key bad.key"]),
        ("data.date=today", ["data.date=today", "2024-07-26"]),
        ("nonsense=1", ["unknown key nonsense", "--help"]),
        ("train.max_step=4", ["unknown key train.max_step", "did you mean train.max_steps?"]),
        ("max_steps=4", ["unknown key max_steps", "did you mean train.max_steps?"]),
        ("keep=4", ["unknown key keep", "did you mean checkpoint.keep?"]),
        ("trian.max_steps=4", ["trian.max_steps", "did you mean train.max_steps?"]),
        ("chekpoint.every=4", ["chekpoint.every", "did you mean checkpoint.every?"]),
        ("trian={max_steps: 4}", ["trian.max_steps", "did you mean train.max_steps?"]),
        ("eval.max_new_token=4", ["eval.max_new_token", "did you mean eval.max_new_tokens?"]),
        ("train=3", ["train is a section"]),
        ("train.max_steps=abc", ["train.max_steps", "'abc'", "Integer"]),
        ("train.max_steps=1.5", ["train.max_steps", "1.5"]),
        ("train.max_steps=", ["train.max_steps", "int"]),
        ("train.compile=maybe", ["train.compile", "'maybe'", "bool"]),
        ("train.epochs=[1", ["train.epochs=[1", "command line"]),
        ("train.epochs=inf", ["train.epochs=inf", "finite"]),
        ("train.learning_rate=nan", ["train.learning_rate=nan", "finite"]),
        ("train.learning_rate=-1", ["train.learning_rate=-1", "the least is 0"]),
        ("data.max_length=1", ["data.max_length=1", "the least is 2"]),
        ("train.precision=fp61", ["train.precision=fp61", "auto, fp32, fp16, bf16", "did you mean fp16?"]),
        ("train.precision=", ["train.precision=", "auto, fp32, fp16, bf16"]),
        ("hub.token=hf_abc", ["hub.token", "HF_TOKEN"]),
        ("tracking.wandb_api_key=abc", ["tracking.wandb_api_key", "WANDB_API_KEY"]),
        ("HF_TOKEN=hf_abc", ["HF_TOKEN", "not a setting"]),
        ("train.max_steps", ["'train.max_steps'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("train..max_steps=3", ["train.", "unknown key"]),
        ("seed=${nope}", ["seed", "nope"]),
        ("seed=4294967296", ["seed=4294967296", "below"]),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_the_remedy(load, override, parts):
    with refused(*parts):
        load("", override)


@pytest.mark.parametrize("secret", ["hub.token=hf_abc", "tracking.api_key=hf_abc", "HF_TOKEN=hf_abc"])
def test_a_secret_is_not_repeated(load, secret):
    with pytest.raises(Exception) as caught:
        load("", secret)
    assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {max_steps: 5\nseed: 1\n", [":2:", "not valid YAML"]),
        ("seed: 1\n\ttrain: 2\n", [":2:1", "not valid YAML"]),
        ("a\x00b", ["not valid YAML"]),
        ("- seed\n", ["key: value"]),
        ("just words\n", ["unknown key", "just words"]),
        ("seed: 2024-13-01\n", ["cannot be read"]),
        ("train:\n  max_stepz: 3\n", ["train.max_stepz", "did you mean train.max_steps?"]),
        ("train:\n", ["train is a section"]),
        ("train:\n  max_steps: many\n", ["train.max_steps", "'many'"]),
        ("hub:\n  token: hf_abc\n", ["hub.token", "HF_TOKEN"]),
        ("model:\n  revision: 0123456\n", ["model.revision", "42798", "quotes"]),
        ("model:\n  revision: 12e4567\n  name:\n", ["model.name"]),
        ("3: 4\n", ["unknown key 3"]),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_place(tmp_path, load, text, parts):
    with refused(str(tmp_path / "test.yaml"), *parts):
        load(text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff\xfe")
    with refused("c.yaml", "cannot be read"):
        load_config(BaseConfig, tmp_path / "c.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.max_steps=0", "train.epochs=0"], ["train.max_steps", "train.epochs", "set one"]),
        (["data.format=prompt-response", "data.prompt_template=Q:"], ["data.prompt_template", "{prompt}"]),
    ],
)
def test_a_contradiction_is_refused(load, overrides, parts):
    with refused(*parts):
        load("", *overrides)


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "smoke.yaml", "seed=9", "train.max_steps=2"],
        ["seed=9", "--config", "smoke.yaml", "train.max_steps=2"],
        ["seed=9", "train.max_steps=2", "--config", "smoke.yaml"],
        ["seed=9", "train.max_steps=2", "--config=smoke.yaml"],
    ],
)
def test_config_may_stand_anywhere(script, argv):
    config = parse_config(BaseConfig, script, argv)
    assert (config.seed, config.train.max_steps) == (9, 2)
    assert config.output_dir == str(REPOSITORY / "runs" / "some-project" / "smoke")


def test_config_is_a_path_or_a_name_beside_the_script(script):
    assert parse_config(BaseConfig, script, []).seed == 1, "config.yaml is the default"
    assert parse_config(BaseConfig, script, ["--config", "smoke.yaml"]).seed == 2
    Path("smoke.yaml").write_text("seed: 3\n")
    assert parse_config(BaseConfig, script, ["--config", "smoke.yaml"]).seed == 3, "a path that exists comes first"
    named = parse_config(BaseConfig, script, ["--config", str(Path("smoke.yaml").resolve()), "output_dir=out"])
    assert (named.seed, named.output_dir) == (3, "out")
    with refused("--config other.yaml", "config.yaml, smoke.yaml"):
        parse_config(BaseConfig, script, ["--config", "other.yaml"])


@pytest.mark.parametrize("flag", ["--train.max_steps=3", "--conf=smoke.yaml", "-x"])
def test_an_unknown_option_is_refused(script, flag):
    with refused(f"unknown option {flag}", "key=value"):
        parse_config(BaseConfig, script, ["seed=1", flag, "train.max_steps=2"])


def test_help_lists_every_key_with_default_choices_and_meaning(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(ProjectConfig, script, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    lines = {line.split("=")[0].strip(): line for line in text.splitlines()}
    for name, f, default in walk(ProjectConfig):
        assert f"{name}={default!r}" in lines[name]
        assert f.metadata.get("help", "") in lines[name]
    assert "how 100% of it tastes (plain|sweet)" in lines["flavour"]


@pytest.mark.parametrize(("micro_batch", "world_size", "expected"), [(4, 1, 4), (4, 2, 2), (2, 8, 1), (16, 1, 1)])
def test_accumulation_follows_from_the_global_batch(micro_batch, world_size, expected):
    config = BaseConfig(train=TrainConfig(global_batch_size=16, micro_batch_size=micro_batch))
    assert accumulation_steps(config, world_size) == expected


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "remedy"),
    [(16, 3, 2, "12 or 18"), (16, 4, 8, "set it to 32"), (1, 2, 1, "set it to 2,")],
)
def test_a_global_batch_that_does_not_split_says_what_to_set(global_batch, micro_batch, world_size, remedy):
    config = BaseConfig(train=TrainConfig(global_batch_size=global_batch, micro_batch_size=micro_batch))
    with refused("train.global_batch_size", "train.micro_batch_size", f"{micro_batch} × {world_size}", remedy):
        accumulation_steps(config, world_size)


def test_every_default_is_within_its_own_limits():
    for name, f, default in walk(BaseConfig):
        assert f.metadata["help"], name
        choices, minimum = f.metadata["choices"], f.metadata["minimum"]
        assert not choices or default in choices, name
        assert minimum is None or (default >= minimum and math.isfinite(default)), name


def test_no_garbage_is_collected_while_a_script_imports(monkeypatch):
    monkeypatch.setattr(sys, "argv", [TRAIN_PY, "--config", "smoke.yaml"])
    collected = [gc.isenabled()]
    check_command_line(BaseConfig, TRAIN_PY)
    collected.append(gc.isenabled())
    with pytest.raises(SystemExit):
        errors.run(lambda: collected.append(gc.isenabled()))
    assert collected == [True, False, True]


def test_a_script_ends_with_one_error_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, TRAIN_PY, "bad.key=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    assert "unknown key bad.key" in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
