"""Evaluation: sums equal a plain full-logits computation on any number of processes; answers equal one-by-one ones."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import refused
from matplotlib.image import imread

from common.comparison import check_training, compare, fine_tuned_model
from common.config import BaseConfig, DataConfig, ModelConfig, save_config
from common.data import Prompt, load_rows, prompt_tokens, tokenize
from common.errors import UserError
from common.evaluation import evaluate, figures, held_out_batches, predicted_bytes
from common.generation import answer_scores, encode_prompt, generate, make_greedy, questions, without_rest
from common.loss import IGNORE, CausalLMLoss
from common.models import load_model, load_tokenizer, repeat_grouped_heads
from common.tracking import start_tracker

REPOSITORY = Path(__file__).resolve().parent.parent
FAMILIES = ["qwen2", "llama", "opt", "bloom"]
CPU = torch.device("cpu")


def data_config(data_format: str = "prompt-response", **keys) -> DataConfig:
    return DataConfig(format=data_format, **{"eval_rows": 37, **keys})


def held_out(data_format: str = "prompt-response", family: str = "qwen2", **keys):
    data = data_config(data_format, **keys)
    tokenizer = load_tokenizer(ModelConfig(f"tiny:{family}"), seed=1)
    _, rows = load_rows(data, seed=1)
    return rows, tokenize(rows, data, tokenizer, packing="none"), tokenizer


def lively_model(family: str = "qwen2", seed: int = 1):
    """A tiny model far from its start: fresh ones, with tied embeddings, only ever repeat the prompt's last token."""
    model = load_model(ModelConfig(f"tiny:{family}"), seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
    return model


def sums_of(model, batches) -> torch.Tensor:
    return evaluate(CausalLMLoss(model), batches, CPU)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_each_row_is_evaluated_once_and_ranks_stay_in_step(world_size):
    _, rows, tokenizer = held_out()
    ranks = [held_out_batches(rows, 4, tokenizer.pad_token_id, rank, world_size) for rank in range(world_size)]
    seen = []
    for batch in (batch for batches in ranks for batch in batches):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            targets = (labels != IGNORE).nonzero()
            if len(targets):
                seen.append(ids[: targets[-1] + 1].tolist())
    assert sorted(seen) == sorted(rows[i]["input_ids"].tolist() for i in range(len(rows)))
    assert {len(batches) for batches in ranks} == {math.ceil(10 / world_size)}
    # The same batches, whoever runs them: this is what makes the figures equal to the last bit.
    alone = [batch["input_ids"].tolist() for batch in held_out_batches(rows, 4, tokenizer.pad_token_id)]
    dealt = [batch for batches in ranks for batch in batches]
    with_targets = [batch["input_ids"].tolist() for batch in dealt if (batch["labels"] != IGNORE).any()]
    assert sorted(with_targets) == sorted(alone)
    assert all(len(batch["labels"]) == 1 for batch in dealt if (batch["labels"] == IGNORE).all())


def test_little_is_padded_and_two_ranks_share_the_work():
    _, rows, tokenizer = held_out("text", eval_rows=200)
    work = [
        sum(batch["input_ids"].numel() for batch in held_out_batches(rows, 4, tokenizer.pad_token_id, rank, 2))
        for rank in range(2)
    ]
    assert sum(work) < 1.1 * rows.lengths.sum()
    assert max(work) < 1.04 * min(work)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("data_format", ["text", "prompt-response"])
def test_sums_equal_full_logits_row_by_row(family, data_format):
    _, rows, tokenizer = held_out(data_format, family)
    model = lively_model(family)
    expected = torch.zeros(3, dtype=torch.float64)
    for row in rows:
        logits = model(row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        wanted = labels != IGNORE
        loss = F.cross_entropy(logits.double(), labels, ignore_index=IGNORE, reduction="sum")
        right = (logits.argmax(-1) == labels)[wanted].sum()
        expected += torch.tensor([loss.item(), wanted.sum(), right], dtype=torch.float64)
    measured = sums_of(model, held_out_batches(rows, 4, tokenizer.pad_token_id))
    assert measured.dtype == torch.float64
    assert measured[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert measured[1:].tolist() == expected[1:].tolist()


def test_ranks_add_up_to_one_process():
    _, rows, tokenizer = held_out()
    model, pad = lively_model(), tokenizer.pad_token_id
    alone = sums_of(model, held_out_batches(rows, 4, pad))
    together = sum(sums_of(model, held_out_batches(rows, 4, pad, rank, 3)) for rank in range(3))
    assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-12)


def test_evaluation_leaves_the_model_as_it_was_and_obeys_the_precision():
    _, rows, tokenizer = held_out()
    model, batches = CausalLMLoss(lively_model()), held_out_batches(rows, 8, tokenizer.pad_token_id)
    model.train()
    exact = evaluate(model, batches, CPU)
    rounded = evaluate(CausalLMLoss(model.model, autocast=torch.bfloat16), batches, CPU)
    assert model.training and all(p.grad is None for p in model.parameters()) and not rounded.requires_grad
    assert rounded[0] != exact[0] and rounded[0].item() == pytest.approx(exact[0].item(), rel=0.02)
    model.eval()
    evaluate(model, batches, CPU)
    assert not model.training


def test_bits_per_byte_by_hand(tmp_path):
    # 12 bits over "naïve €": 10 bytes of UTF-8, 7 characters.
    texts = [{"prompt": "Write:", "response": "naïve €"}, {"prompt": "Write it again, at length:", "response": "x y"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    data = data_config(name=str(path), eval_rows=1)
    train, _ = load_rows(data, seed=1)
    tokenizer = load_tokenizer(ModelConfig("tiny:qwen2"), seed=1)
    rows = tokenize(train, data, tokenizer, packing="none")
    response = train[0]["response"]
    assert predicted_bytes(rows, tokenizer) == len(response.encode())  # neither the prompt nor EOS has bytes here
    measured = figures(torch.tensor([12 * math.log(2), 4, 3], dtype=torch.float64), len("naïve €".encode()))
    assert measured["bits_per_byte"] == pytest.approx(1.2)
    assert measured["loss"] == pytest.approx(3 * math.log(2)) and measured["perplexity"] == pytest.approx(8)
    assert measured["token_accuracy"] == 0.75 and measured["tokens"] == 4


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_bytes_of_a_text_leave_out_what_nothing_predicts(family):
    rows, tokenized, tokenizer = held_out("text", family, max_length=1024)
    everything = sum(len(row["text"].encode()) for row in rows)
    # Without a BOS, a text's first token has nothing before it, so it is not a target.
    firsts = sum(len(tokenizer.decode(row["input_ids"][:1], skip_special_tokens=True).encode()) for row in tokenized)
    assert predicted_bytes(tokenized, tokenizer) == everything - firsts
    assert (firsts == 0) == (family == "llama")


def test_loss_that_is_not_finite_is_an_error():
    with pytest.raises(UserError, match=r"train\.precision=fp32"):
        figures(torch.tensor([math.nan, 4, 3], dtype=torch.float64), 10)


def greedy_by_hand(model, prompt: list[int], steps: int, ends: set[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def answers_by_hand(model, tokenizer, prompts, steps, ends):
    new = [greedy_by_hand(model, prompt, steps, ends) for prompt in prompts]
    return new, tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


PROMPTS = ["What is it?\n", "What does asyncio.Queue.get_nowait(self) do, and when does it raise an error?\n", "Why\n"]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_answers_equal_one_by_one(family):
    tokenizer, model = load_tokenizer(ModelConfig(f"tiny:{family}"), seed=1), lively_model(family)
    prompts = [encode_prompt(Prompt(prompt, "It."), data_config(), tokenizer, 256) for prompt in PROMPTS]
    ids, expected = answers_by_hand(model, tokenizer, prompts, 12, {tokenizer.eos_token_id})
    # A chat model's own settings, which must have no say in a comparison.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    make_greedy(model, tokenizer)
    assert generate(model, tokenizer, prompts, 12, torch.float32) == expected
    assert len({token for answer in ids for token in answer}) > 6  # the comparison had something to compare


@pytest.mark.skipif(not hasattr(transformers, "AttentionMaskInterface"), reason="transformers repeats them itself")
def test_answers_do_not_change_where_grouped_heads_are_repeated():
    tokenizer, model = load_tokenizer(ModelConfig("tiny:qwen2"), seed=1), lively_model()
    prompts = [encode_prompt(Prompt(prompt, "It."), data_config(), tokenizer, 256) for prompt in PROMPTS]
    make_greedy(model, tokenizer)
    expected = generate(model, tokenizer, prompts, 12, torch.float32)
    repeat_grouped_heads(model)  # what a T4 needs
    assert model.config._attn_implementation == "sdpa_repeated_heads"
    assert generate(model, tokenizer, prompts, 12, torch.float32) == expected
    assert generate(model, tokenizer, prompts[:1], 12, torch.float32) == expected[:1]  # nothing is padded


def test_any_end_token_of_the_model_stops_an_answer():
    tokenizer, model = load_tokenizer(ModelConfig("tiny:qwen2"), seed=1), lively_model()
    prompts = [encode_prompt(Prompt(prompt, "It."), data_config(), tokenizer, 256) for prompt in PROMPTS]
    (first, *_), _ = answers_by_hand(model, tokenizer, prompts, 12, set())
    end = first[3]
    ids, expected = answers_by_hand(model, tokenizer, prompts, 12, {end, tokenizer.eos_token_id})
    assert len(ids[0]) <= 4 < max(map(len, ids))  # one answer ends early, another continues
    model.generation_config.eos_token_id = [end]
    make_greedy(model, tokenizer)
    assert set(model.generation_config.eos_token_id) == {end, tokenizer.eos_token_id}
    assert generate(model, tokenizer, prompts, 12, torch.float32) == expected


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("data_format", ["prompt-response", "messages"])
def test_prompts_are_those_of_training(family, data_format):
    rows, tokenized, tokenizer = held_out(data_format, family, max_length=1024)
    for (prompt, reference), row, trained in zip(
        questions(rows, data_config(data_format), tokenizer), rows, tokenized, strict=True
    ):
        first_target = int((trained["labels"] != IGNORE).nonzero()[0])
        ids = encode_prompt(prompt, data_config(data_format), tokenizer, 1024)
        assert ids == trained["input_ids"][:first_target].tolist()
        assert reference == row["response"]


def test_long_and_empty_prompts_can_be_answered():
    tokenizer, data = load_tokenizer(ModelConfig("tiny:qwen2"), seed=1), data_config()
    ids = encode_prompt(Prompt(PROMPTS[1], "It."), data, tokenizer, 256)
    assert encode_prompt(Prompt(PROMPTS[1], "It."), data, tokenizer, 5) == ids[-5:]
    assert encode_prompt(Prompt("", "It."), data, tokenizer, 5) == [tokenizer.eos_token_id]


def test_an_answer_begins_behind_the_prompt():
    """Where training's first target joins the prompt's end with the response, the model writes that end once more."""
    tokenizer, data = load_tokenizer(ModelConfig("tiny:qwen2"), seed=1), data_config()
    prompt = Prompt("Is it good? ", "good")
    ids, rest = prompt_tokens(prompt, data, tokenizer)
    assert (tokenizer.decode(ids), rest) == ("Is it good?", " ")
    for rest, written, answer in (
        (" ", " good", "good"),
        (" (", "(x)", "x)"),  # decoded without the space that it begins with
        ("(", "x)", "x)"),  # the model wrote something else there
        ("", " good", " good"),
    ):
        assert without_rest(rest, written) == answer


def test_text_is_continued_from_a_word_boundary():
    rows, _, tokenizer = held_out("text")
    for (prompt, rest), row in zip(questions(rows, data_config("text"), tokenizer), rows, strict=True):
        assert prompt.text + rest == row["text"].strip()
        assert 0 < len(prompt.text) <= min(160, len(row["text"]) // 2) and rest[0].isspace()


def test_answer_scores_by_hand():
    # Longest common subsequence "the cat on mat": precision 4/4, recall 4/6, F1 0.8.
    scores = answer_scores(["the cat on mat", " Yes.\n", "yes."], ["the cat sat on the mat", "Yes.", "no"])
    assert scores["rouge_l"] == pytest.approx((0.8 + 1 + 0) / 3)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert answer_scores(["yes."], ["Yes."])["exact_match"] == 0


def test_a_missing_package_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    load_tokenizer(ModelConfig("tiny:llama"), seed=42).save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text("{}")  # a model that could not be loaded
    cfg = BaseConfig(model=ModelConfig("tiny:llama"), data=data_config(), output_dir=str(tmp_path))
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with refused("ROUGE-L", "pip install rouge_score", "eval.generate_rows=0"):
        compare(cfg, project="pytorch-ddp")


def test_missing_fine_tuned_model_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--config", "smoke.yaml", "seed=3"])
    cfg = BaseConfig(output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"pytorch-ddp/launch\.sh --config smoke\.yaml seed=3"):
        fine_tuned_model(cfg, "pytorch-ddp")
    cfg.eval.model = "some/model"
    assert fine_tuned_model(cfg, "pytorch-ddp").name == "some/model"


def test_rows_that_trained_are_never_held_out(tmp_path):
    """Whatever is refused would have let some in, and whatever is not lets none in."""
    (tmp_path / "model").mkdir()
    trained = BaseConfig(data=data_config(eval_rows=20), seed=1)
    save_config(trained, tmp_path / "config.yaml")
    texts = set(load_rows(trained.data, 1)[0]["text"])
    for eval_rows, seed, accepted in ((20, 1, True), (7, 1, True), (60, 1, False), (20, 2, False), (7, 2, False)):
        cfg = BaseConfig(data=data_config(eval_rows=eval_rows), seed=seed)
        overlap = texts & set(load_rows(cfg.data, seed)[1]["text"])
        try:
            assert check_training(cfg, tmp_path / "model") == [] and accepted and not overlap
        except UserError as error:
            assert not accepted and overlap
            assert f"--config {tmp_path / 'config.yaml'}" in str(error)
            assert ("data.eval_rows=60 (training: 20)" in str(error)) == (eval_rows == 60)
            assert (f"seed={seed} (training: 1)" in str(error)) == (seed == 2)
    trained.data.eval_split = "test"  # then all of the other split trained
    save_config(trained, tmp_path / "config.yaml")
    with refused("data.eval_split= (training: test)"):
        check_training(BaseConfig(data=data_config(eval_rows=7), seed=1), tmp_path / "model")


def test_the_same_file_by_another_path_is_the_same_data(tmp_path, monkeypatch):
    """By a relative path, a link or a copy, rows that trained are refused; another file's are not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    text = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50))
    Path("rows.jsonl").write_text(text)
    Path("copy.jsonl").write_text(text)
    Path("link.jsonl").symlink_to("rows.jsonl")
    Path("other.jsonl").write_text(text.upper())
    trained = BaseConfig(data=DataConfig(name=str(tmp_path / "rows.jsonl"), eval_rows=5), seed=1)
    save_config(trained, tmp_path / "run/config.yaml")
    for name in ("rows.jsonl", "./rows.jsonl", "link.jsonl", "copy.jsonl", "run/../rows.jsonl"):
        with refused("data.eval_rows=9 (training: 5)"):
            check_training(BaseConfig(data=DataConfig(name=name, eval_rows=9), seed=1), Path("run/model"))
        assert check_training(BaseConfig(data=DataConfig(name=name, eval_rows=5), seed=1), Path("run/model")) == []
        rows = [list(part["text"]) for part in load_rows(DataConfig(name=name, eval_rows=5), 1)]
        assert rows == [list(part["text"]) for part in load_rows(trained.data, 1)]
    other = BaseConfig(data=DataConfig(name="other.jsonl", eval_rows=9), seed=1)
    assert len(check_training(other, Path("run/model"))) == 1


def test_an_evaluation_says_what_model_and_data_the_training_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/model").mkdir(parents=True)
    model = Path("run/model")
    cfg = BaseConfig(model=ModelConfig("tiny:llama"))
    assert check_training(cfg, model) == []  # a model without the records of a run
    save_config(cfg, tmp_path / "run/config.yaml")
    assert check_training(cfg, model) == check_training(BaseConfig(), Path("run/of-the-hub")) == []
    with refused("model.name=tiny:qwen2 (training: tiny:llama)", "--config run/config.yaml"):
        check_training(BaseConfig(), model)
    cfg.data.name = "other.jsonl"
    assert check_training(cfg, model) == ["the model was trained on pydoc, not on other.jsonl"]
    cfg.data.name = "pydoc"
    cfg.data.format, cfg.data.date = "messages", "2025-01-01"
    assert check_training(cfg, model) == [
        "the model was trained with data.date=2024-07-26, and this is data.date=2025-01-01"
    ]
    cfg.data.format, cfg.data.date = "text", "2024-07-26"
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    for status in ("interrupted", ""):  # none, if it was killed
        if status:
            (tmp_path / "run/summary.json").write_text(json.dumps({"status": status, "steps": 4}))
        else:
            (tmp_path / "run/summary.json").unlink()
        (note,) = check_training(cfg, model)
        assert note.startswith("run was continued after this model was exported") and "step 4" in note
    (tmp_path / "run/config.yaml").write_text("model: {layers: 3}")  # another program's
    assert check_training(BaseConfig(), model) == []


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project folder with the real eval.py, with settings of its own."""
    folder = tmp_path_factory.mktemp("projects") / "pytorch-ddp"
    folder.mkdir()
    shutil.copy(REPOSITORY / "pytorch-ddp" / "eval.py", folder)
    (folder / "settings.py").write_text('from common.config import BaseConfig as Config\n\nPROJECT = "pytorch-ddp"\n')
    (folder / "config.yaml").write_text("data: {eval_rows: 37}\neval: {batch_size: 4, generate_rows: 9, samples: 9}\n")
    return folder


def run_eval(project: Path, processes: int, *settings: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, str(project / "eval.py"), "eval.max_new_tokens=8", *settings],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.slow
def test_one_and_two_processes_write_the_same_figures(project, tmp_path):
    outcomes = {}
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        lively_model().save_pretrained(run_dir / "model")
        load_tokenizer(ModelConfig("tiny:qwen2"), seed=42).save_pretrained(run_dir / "model")
        done = run_eval(project, processes, "data.format=prompt-response", f"output_dir={run_dir}")
        assert done.returncode == 0, done.stderr
        outcomes[processes] = json.loads((run_dir / "eval.json").read_text())
    alone, together = outcomes[1], outcomes[2]
    assert (alone["environment"]["world_size"], together["environment"]["world_size"]) == (1, 2)
    assert alone["samples"] == together["samples"] and len(alone["samples"]) == 9
    for role in ("base", "fine_tuned"):
        for key in (
            "loss",
            "perplexity",
            "token_accuracy",
            "bits_per_byte",
            "rouge_l",
            "exact_match",
            "tokens",
            "bytes",
        ):
            assert together[role][key] == pytest.approx(alone[role][key], rel=1e-6), (role, key)
        assert alone[role]["perplexity"] == pytest.approx(math.exp(alone[role]["loss"]))
    assert alone["base"]["loss"] != pytest.approx(alone["fine_tuned"]["loss"], rel=0.1)

    # What training measures before its first step is what eval.py measures of the base model.
    cfg = BaseConfig(data=data_config())
    tokenizer, model = load_tokenizer(cfg.model, cfg.seed), load_model(cfg.model, cfg.seed)
    rows = tokenize(load_rows(cfg.data, cfg.seed)[1], cfg.data, tokenizer, packing="none")
    total, targets, _ = sums_of(model, held_out_batches(rows, 4, tokenizer.pad_token_id)).tolist()
    assert alone["base"]["loss"] == pytest.approx(total / targets, rel=1e-9)
    assert alone["base"]["tokens"] == targets and alone["rows"] == 37

    # Printed once, although there are two processes; short lines.
    assert done.stdout.count("37 held-out rows") == 1 and done.stdout.count("sample 1") == 1
    table = done.stdout[done.stdout.index("37 held-out rows") : done.stdout.index("\nin ")]
    assert max(map(len, table.splitlines())) <= 100
    first = alone["samples"][0]
    assert all(" ".join(first[part].split())[:80] in table for part in ("prompt", "reference", "base", "fine_tuned"))
    page = (run_dir / "samples.md").read_text()
    assert all(part in page for part in ("## 3", "**base**", "**fine-tuned**", alone["samples"][0]["reference"][:40]))
    assert imread(run_dir / "plots" / "eval.png")[..., :3].std() > 0.05


def test_texts_have_samples_but_no_answer_scores(tmp_path, capsys):
    lively_model("llama").save_pretrained(tmp_path / "model")
    load_tokenizer(ModelConfig("tiny:llama"), seed=42).save_pretrained(tmp_path / "model")
    cfg = BaseConfig(model=ModelConfig("tiny:llama"), data=data_config("text"), output_dir=str(tmp_path), seed=1)
    cfg.eval.max_new_tokens = 8
    cfg.tracking.backend, cfg.tracking.project = "mlflow", "letters"
    save_config(cfg, tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text('{"status": "completed", "steps": 7}')
    start_tracker(cfg, tmp_path, "").finish("completed")  # as the training does
    results = compare(cfg, project="pytorch-ddp")
    assert results == json.loads((tmp_path / "eval.json").read_text())
    # The exported model, read back, has the losses of the one in memory: eval.json agrees with the training's summary.
    _, rows, tokenizer = held_out("text", "llama")
    total, targets, _ = sums_of(lively_model("llama"), held_out_batches(rows, 8, tokenizer.pad_token_id)).tolist()
    assert (results["fine_tuned"]["loss"], results["fine_tuned"]["tokens"]) == (pytest.approx(total / targets), targets)
    assert results["fine_tuned"]["model"] == "model" and results["base"]["model"] == "tiny:llama"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path.parent}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("letters").experiment_id])
    for role in ("base", "fine_tuned"):
        for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
            assert run.data.metrics[f"eval/{role}/{name}"] == results[role][name]
    assert run.info.status == "FINISHED" and "eval/base/rouge_l" not in run.data.metrics
    assert "rouge_l" not in results["base"] and "ROUGE" not in capsys.readouterr().out
    texts = load_rows(cfg.data, cfg.seed)[1]["text"][:4]
    assert [sample["prompt"] + sample["reference"] for sample in results["samples"]] == [text.strip() for text in texts]
    assert any(sample["fine_tuned"].strip() != sample["base"].strip() for sample in results["samples"])


@pytest.mark.slow
def test_missing_model_ends_both_processes_with_one_line(project, tmp_path):
    done = run_eval(project, 2, f"output_dir={tmp_path}")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "pytorch-ddp/launch.sh eval.max_new_tokens=8" in done.stderr
