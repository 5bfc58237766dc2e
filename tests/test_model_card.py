"""The model card: what the Hub reads of it, what a person reads, and the evaluation's figures in it."""

import math

import pytest
import yaml
from huggingface_hub import ModelCard

from common.config import BaseConfig, ModelConfig
from common.export import read_card
from common.model_card import model_card, with_evaluation

SUMMARY = {"project": "pytorch-fsdp", "steps": 1200, "eval_loss_before": 3.5, "eval_loss_after": 2.25,
           "tokens_per_second": 12_345.6, "seconds": 600.0}  # fmt: skip
ENVIRONMENT = {"world_size": 2, "gpus": [{"name": "Tesla T4", "memory_gib": 14.7}] * 2, "precision": "fp16: below 8.0",
               "versions": {"torch": "2.10.0", "transformers": "5.0.0", "mlflow": "3.0.0"}}  # fmt: skip
RESULTS = {"project": "pytorch-fsdp", "rows": 200, "settings": {"data": "stanfordnlp/imdb"},
           "base": {"loss": 3.5, "perplexity": 33.1, "rouge_l": 0.1, "bits_per_byte": 1.2},
           "fine_tuned": {"loss": 2.25, "perplexity": 9.5, "rouge_l": 0.3, "bits_per_byte": 0.9}}  # fmt: skip


@pytest.fixture
def cfg() -> BaseConfig:
    cfg = BaseConfig()
    cfg.model.name, cfg.data.name, cfg.hub.repo_id = "facebook/opt-1.3b", "stanfordnlp/imdb", "alice/tuned"
    return cfg


def parts(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def metrics(front: dict) -> dict[str, float]:
    (model,) = front["model-index"]
    (result,) = model["results"]
    return {metric["type"]: metric["value"] for metric in result["metrics"]}


def test_the_front_matter_names_the_sources_and_the_figures(cfg):
    front, body = parts(model_card(cfg, SUMMARY, ENVIRONMENT))
    assert front["base_model"] == "facebook/opt-1.3b" and front["datasets"] == ["stanfordnlp/imdb"]
    assert front["tags"] == ["fine-tuned", "multi-gpu", "pytorch-fsdp"]
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert "license" not in front and "The licence of the base model holds" in body
    assert front["model-index"][0]["name"] == "tuned"
    assert front["model-index"][0]["results"][0]["dataset"] == {
        "name": "stanfordnlp/imdb", "type": "stanfordnlp/imdb", "split": "held out of training"}  # fmt: skip
    assert metrics(front) == {"loss": 2.25, "perplexity": round(math.exp(2.25), 5)}
    for line in ("# tuned", "| held-out loss (nats) | 3.5000 | 2.2500 |", "| optimizer steps | 1200 |",
                 "| hardware | 2 × Tesla T4 (14.7 GiB) |", "| precision | fp16 |",
                 "| time | 10.0 minutes, 12,346 tokens/s |",
                 "| software | torch 2.10.0, transformers 5.0.0 |"):  # fmt: skip
        assert line in body.splitlines()
    assert "## Limitations" in body and 'pipeline("text-generation", "alice/tuned")' in body


def test_licence_and_language_are_those_of_the_base(cfg, tmp_path):
    head = "license: other\nlicense_name: opt\nlanguage: en\ntags: [theirs]"
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Opt\n")
    front, body = parts(model_card(cfg, SUMMARY, base_card=read_card(tmp_path)))
    assert (front["license"], front["license_name"], front["language"]) == ("other", "opt", "en")
    assert "theirs" not in front["tags"] and "The licence of the base" not in body
    assert read_card(tmp_path / "none") == ""
    front, _ = parts(model_card(BaseConfig(model=ModelConfig("smollm2")), {}))
    assert front["license"] == "apache-2.0" and front["language"] == ["en"]


def test_a_run_without_figures_and_an_embedded_one_leave_out_what_they_lack(cfg, tmp_path):
    front, body = parts(model_card(cfg, {"project": "deepspeed-pipeline", "steps": 3}))
    assert "model-index" not in front and "## Results" not in body and "| time" not in body and "| hardware" not in body
    cfg = BaseConfig()
    cfg.data.name = str(tmp_path)
    front, body = parts(model_card(cfg, SUMMARY | {"eval_loss_before": None}))
    assert not {"base_model", "datasets"} & front.keys()
    assert front["model-index"][0]["name"] == "tiny-qwen2-fine-tuned" and "| – | 2.2500 |" in body


@pytest.mark.parametrize(
    ("form", "template", "call"),
    [
        ("text", "{prompt}", 'generate("We show that", max_new_tokens=64)[0]["generated_text"]'),
        ("messages", "{prompt}", 'generate([{"role": "user", "content": "Hello!"}], max_new_tokens=64)'),
        ("prompt-response", "Q: {q} ({hint})\nA:", """generate('Q: {q} ({hint})\\nA:'.format(q="...", hint="...")"""),
    ],
)
def test_the_snippet_asks_as_the_training_did(cfg, form, template, call):
    cfg.data.format, cfg.data.prompt_template = form, template
    code = model_card(cfg, SUMMARY).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert call in code


@pytest.mark.parametrize("summary", [SUMMARY, {"project": "pytorch-fsdp"}])
def test_an_evaluation_puts_its_figures_in_both_places_and_a_second_one_replaces_them(cfg, summary):
    card = model_card(cfg, summary, ENVIRONMENT)
    once = with_evaluation(card, RESULTS)
    front, body = parts(once)
    assert metrics(front) == {"loss": 2.25, "perplexity": 9.5, "rouge_l": 0.3, "bits_per_byte": 0.9}
    assert "| ROUGE-L ↑ | 0.100 | 0.300 | +0.200 |" in body and "before | after" not in body
    assert body.count("## Results") == 1 and body.index("## Results") < body.index("## Use")
    earlier, earlier_body = parts(card)
    assert front | {"model-index": 0} == earlier | {"model-index": 0}
    assert body[body.index("## Use") :] == earlier_body[earlier_body.index("## Use") :]
    assert with_evaluation(once, RESULTS) == once
    ModelCard(once).data.to_yaml()  # huggingface_hub reads it
