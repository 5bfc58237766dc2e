"""model/ is what transformers would have written, in parts of a bounded size, with the base's other files as is."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, refused
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import export
from common.config import ModelConfig
from common.errors import UserError
from common.export import Export, check_space, gather_all, kept_files, parts
from common.models import load_model, load_tokenizer
from common.runtime import DTYPES

# Published files of these have other names and shapes than the modules in memory: experts one by one, joined
# projections, several halves in one.
CONVERTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v2", "jamba", "phimoe", "gpt_oss")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def base_of(model, folder: Path) -> ModelConfig:
    """`model` and a tokenizer in a folder, as someone would have published them."""
    model.save_pretrained(folder)
    load_tokenizer(ModelConfig("tiny:qwen2")).save_pretrained(folder)
    return ModelConfig(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file_size", [10**9, 10**5])
def test_the_export_reloads_to_the_same_logits(family, file_size, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_SIZE", file_size)
    base = ModelConfig(f"tiny:{family}")
    model = load_model(base, seed=3).eval()
    gathered = []

    def gather(tensor):
        gathered.append(tensor)
        return tensor.clone()

    Export(base, tmp_path / "model").write(model, "a card", gather)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    ids = torch.arange(64).reshape(2, 32)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, model(ids).logits)
    assert type(reloaded) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert len(gathered) == len({id(t) for t in gathered}) == len(list(model.parameters()))  # a tied tensor once
    assert (tmp_path / "model/README.md").read_text() == "a card"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    if file_size == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        return
    layer = max(sum(t.numel() for t in part.values()) * 4 for part in parts(model, 0))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < max(file_size, layer) + 10_000
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    for file in files:
        with safe_open(file, "pt") as opened:
            assert {index["weight_map"][name] for name in opened.keys()} == {file.name}  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors_of(tmp_path / "model").values())


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "gpt_neox", *CONVERTED])
def test_names_types_and_values_are_those_that_save_pretrained_writes(family, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "FILE_SIZE", 10**5)
    model = tiny_model(family)
    if model is None:
        pytest.skip(f"this transformers has no small {family}")
    base = base_of(model, tmp_path / "base")
    Export(base, tmp_path / "model").write(model, "", torch.Tensor.detach)
    wanted, written = tensors_of(tmp_path / "base"), tensors_of(tmp_path / "model")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())
    assert {name: t.dtype for name, t in written.items()} == {name: t.dtype for name, t in wanted.items()}


@pytest.mark.slow
def test_every_model_of_transformers_is_exported_as_save_pretrained_would_or_refused_at_the_start(tmp_path):
    same, refusals = [], []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if (model := tiny_model(family)) is None:
            continue
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name)
            try:
                base = base_of(model, folder / "base")
            except Exception:  # transformers itself does not save these shapes
                continue
            try:
                done = Export(base, folder / "model")
            except UserError as error:
                assert "\n" not in str(error), family
                refusals.append(family)
                continue
            done.write(model, "", torch.Tensor.detach)
            wanted, written = tensors_of(folder / "base"), tensors_of(folder / "model")
            assert written.keys() == wanted.keys(), family
            assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items()), family
            same.append(family)
    assert len(same) > 60 and len(refusals) < 6, (same, refusals)


def test_experts_are_published_one_by_one(tmp_path):
    """transformers 5 holds them in one tensor; what transformers 4 reads has a tensor for each."""
    model = tiny_model("qwen3_moe")
    base = base_of(model, tmp_path / "base")
    Export(base, tmp_path / "model").write(model, "", torch.Tensor.detach)
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in tensors_of(tmp_path / "model")


def test_other_ranks_gather_the_same_tensors_in_the_same_order(tmp_path):
    base = ModelConfig("tiny:opt")
    model = load_model(base)
    main, other = [], []
    Export(base, tmp_path / "model").write(model, "", lambda t: main.append(id(t)) or t.detach())
    gather_all(model, lambda t: other.append(id(t)) or t.detach())
    assert main == other and len(main) == len(list(model.parameters()))


def test_sixteen_bit_weights_whose_masters_are_fp32_are_exported_in_fp32(tmp_path):
    base = ModelConfig("tiny:llama")
    model = load_model(base)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.half()
    by_tensor = {id(p): masters[name] for name, p in model.named_parameters()}
    Export(base, tmp_path / "model").write(model, "", lambda tensor: by_tensor[id(tensor)])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert all(p.dtype == torch.float32 and torch.equal(p, masters[name]) for name, p in reloaded.named_parameters())
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


GENERATION = {
    "as Llama-3's": {"bos_token_id": 0, "do_sample": True, "eos_token_id": [0, 5, 6], "temperature": 0.6, "top_p": 0.9},
    "as Llama-2's first": {"bos_token_id": 0, "eos_token_id": 0, "temperature": 0.9, "top_p": 0.6},  # and no do_sample
    "of a later version": {"eos_token_id": 0, "a_setting_to_come": [1]},
    "none": None,
}


@pytest.mark.parametrize("kind", GENERATION)
def test_what_training_does_not_change_is_kept_byte_for_byte(kind, tmp_path):
    model = tiny_model("llama")
    base = base_of(model, tmp_path / "base")
    folder = tmp_path / "base"
    (folder / "generation_config.json").unlink()
    if GENERATION[kind] is not None:
        (folder / "generation_config.json").write_text(json.dumps(GENERATION[kind], indent=3))
    others = {
        "LICENSE.txt": "Use it well.",
        "USE_POLICY.md": "# Policy",
        "chat_template.jinja": "{% for m in messages %}{{ m.content }}{{ strftime_now('%d') }}{% endfor %}",
        "additional_chat_templates/tool.jinja": "{{ messages }}",
        "special_tokens_map.json": '{"eos_token":\n  "<|endoftext|>"}',
    }
    for name, text in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    changed = {"README.md": "base card", "pytorch_model.bin": "old", "original/consolidated.pth": "old", ".hidden": ""}
    for name, text in changed.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"attention_dropout": 0.1, "torch_dtype": "bfloat16", "of_the_author": {"x": None}, "use_cache": False}
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))

    done = Export(base, tmp_path / "model")
    before = kept_files(folder)
    shutil.rmtree(folder)  # what the export needs is read at the start
    done.write(model, "card", torch.Tensor.detach)
    after = {
        str(p.relative_to(tmp_path / "model")): p.read_bytes() for p in (tmp_path / "model").rglob("*") if p.is_file()
    }
    assert set(others) <= set(before) and not set(changed) & set(before)
    assert ("generation_config.json" in before) is (kind != "none")
    assert {name: after.pop(name) for name in before} == before
    assert json.loads(after.pop("config.json")) == settings | {"torch_dtype": "float32"}
    assert after.pop("README.md") == b"card"
    assert set(after) == {"model.safetensors"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.slow
def test_an_export_imports_no_training_framework(tmp_path):
    code = (
        "import gc, sys; gc.disable(); from pathlib import Path; from common.config import ModelConfig\n"
        "from common.export import Export; from common.models import load_model; base = ModelConfig('tiny:qwen2')\n"
        "Export(base, Path(sys.argv[1])).write(load_model(base), '', lambda tensor: tensor.detach())\n"
        "assert not {'deepspeed', 'ray', 'composer'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr + done.stdout, done.stderr


def test_an_export_that_does_not_read_back_leaves_the_earlier_one(tmp_path, monkeypatch):
    base = ModelConfig("tiny:qwen2")
    done = Export(base, tmp_path / "model")
    done.write(load_model(base, seed=1), "first", torch.Tensor.detach)
    first = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def damage(files, folder):
        tensors = load_file(files[0])
        name = max(tensors, key=lambda key: tensors[key].numel())
        tensors[name][1, 1] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        files[0].unlink()

    monkeypatch.setattr(export, "_name_files", damage)
    with refused("Qwen2ForCausalLM", "other values", "embed_tokens"):
        done.write(load_model(base, seed=2), "second", torch.Tensor.detach)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == first
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_read_back_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_name_files", lambda files, folder: files[-1].rename(folder / "model.safetensors"))
    with refused("LlamaForCausalLM", "missing", "nothing was exported"):
        Export(ModelConfig("tiny:llama"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_16_bits_are_those_of_32_rounded_once(family, dtype, tmp_path):
    base = ModelConfig(f"tiny:{family}")
    model = load_model(base, seed=3).eval()
    Export(base, tmp_path / "fp32").write(model, "", torch.clone)
    Export(base, tmp_path / "half", dtype).write(model, "", torch.clone)
    whole, half = tensors_of(tmp_path / "fp32"), tensors_of(tmp_path / "half")
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(DTYPES[dtype])) for name, tensor in whole.items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert reloaded.dtype == DTYPES[dtype]
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        expected, logits = model(ids).logits, reloaded.float().eval()(ids).logits
    rounding = torch.finfo(DTYPES[dtype]).eps
    assert 0 < (logits - expected).abs().max() < 8 * rounding * expected.abs().max()


def test_a_weight_that_fp16_cannot_hold_is_named_and_nothing_is_exported(tmp_path):
    base = ModelConfig("tiny:llama")
    model = load_model(base)
    model.get_output_embeddings().weight.data[0, 0] = 1e5
    with refused("export.dtype=fp16", "65,504", "bf16"):
        Export(base, tmp_path / "model", "fp16").write(model, "", torch.clone)
    assert not list(tmp_path.iterdir())
    Export(base, tmp_path / "model", "bf16").write(model, "", torch.clone)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_usual_mode(umask, tmp_path):
    earlier = os.umask(umask)
    try:
        Export(ModelConfig("tiny:bloom"), tmp_path / "model").write(
            load_model(ModelConfig("tiny:bloom")), "", torch.clone
        )
    finally:
        os.umask(earlier)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}


def test_a_disk_without_room_for_checkpoint_and_model_is_refused(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    free = {"is": 0}
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free["is"]))
    million = 2**20

    def fits(free_mib, left_to_train=True):
        free["is"] = free_mib * million
        check_space(tmp_path, million, checkpoints, left_to_train)

    fits(16)
    with refused("output_dir=", "15 MiB are free", "16 MiB"):
        fits(15)
    fits(4, left_to_train=False)
    with refused("3 MiB are free", "4 MiB"):
        fits(3, left_to_train=False)
    (checkpoints / "step-00000003").mkdir(parents=True)
    (checkpoints / "step-00000003/state").write_bytes(bytes(12 * million))
    fits(12)  # the earlier checkpoint makes room for model/
    with refused("11 MiB are free", "12 MiB"):
        fits(11)
