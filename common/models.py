"""Models and tokenizers: from the Hub, from a local folder, `smollm2`, or the embedded `tiny:` ones.

A `tiny:` model is the real architecture class with small shapes and random weights from the seed; its byte-level BPE
tokenizer is trained on the embedded data. It needs no network, and everything that holds for it holds for the real one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import pydoc_data, smollm2
from common.attached import attached_model
from common.config import DataConfig, ModelConfig
from common.document_attention import check_documents
from common.errors import UserError
from common.hub import explain_hub_error, is_hub_id, token
from common.local_model import check_model_folder
from common.small_model import DTYPE_KEY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Of files with weights, in any framework's format; and of what else may be large, and belongs to other weights.
WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".ggml", ".onnx", ".onnx_data", ".ot",
    ".npz", ".pkl", ".tflite", ".mlmodel", ".index.json",
)  # fmt: skip
TINY_VOCABULARY = 2048
# The shapes keep what matters of the real models: tied embeddings, grouped key/value heads, positions of each kind.
TINY_SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "llama": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True},
    "opt": {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "word_embed_proj_dim": 64, "max_position_embeddings": 1024},
    "bloom": {"hidden_size": 64, "n_layer": 4, "n_head": 4},
}  # fmt: skip
QWEN2_WORDS = (  # where Qwen2's tokenizer splits before it merges bytes
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def located(model: ModelConfig) -> ModelConfig:
    """Where transformers finds `model`: `smollm2` in the cache; the folder of a Hub model that Kaggle has attached."""
    if model.name == smollm2.NAME:
        return dataclasses.replace(model, name=str(smollm2.folder()))
    attached = attached_model(model.name) if is_hub_id(model.name) else None
    return dataclasses.replace(model, name=str(attached)) if attached else model


def load_tokenizer(model: ModelConfig, seed: int = 0) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with a pad token (EOS if it has none). Raises `UserError` if it is unavailable."""
    model = located(model)
    if family := _tiny_family(model.name):
        return _tiny_tokenizer(family)
    try:
        tokenizer = read_tokenizer(model)
    except Exception as error:  # whatever the Hub's client, the parser of a file or the disk raises
        check_model_folder(model.name, with_weights=False)
        raise explain_hub_error(error, "model", model.name) from error
    _check_vocabulary(model, tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name={model.name}: its tokenizer has no end-of-sequence token, which training needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or of the Hub as it is there."""
    where = {"revision": model.revision, "token": token()}
    try:
        return AutoTokenizer.from_pretrained(model.name, **where)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
    # Written by transformers 5 and read by 4: the class has another name there, and so has the list of special tokens.
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    special = get_tokenizer_config(model.name, **where).get("extra_special_tokens") or []
    names = {"extra_special_tokens": {}, "additional_special_tokens": special}
    return transformers.PreTrainedTokenizerFast.from_pretrained(model.name, **names, **where)


def _check_vocabulary(model: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise `UserError` if the tokenizer can give a token that the model has no embedding for.

    More embeddings than tokens are common, and fine: vocabularies are padded to a multiple that suits the hardware.
    """
    try:
        config = AutoConfig.from_pretrained(model.name, revision=model.revision, token=token())
        embeddings = config.get_text_config().vocab_size
    except Exception:  # a tokenizer alone; a configuration that cannot be read is reported where it is needed
        return
    roles = {tokenizer.eos_token: "eos_token", tokenizer.bos_token: "bos_token", tokenizer.pad_token: "pad_token"}
    above = {text: n for text, n in tokenizer.get_vocab().items() if n >= embeddings}
    # Text never gives a special token without a role: gemma-3-1b's <image_soft_token> is one above its embeddings.
    above = {text: n for text, n in above.items() if text in roles or text not in tokenizer.all_special_tokens}
    if not above:
        return
    text = max(above, key=lambda text: (text in roles, above[text]))
    role = f", its {roles[text]}" if text in roles else ""
    raise UserError(
        f"model.name={model.name}: its tokenizer has the token {text!r} with id {above[text]}{role}, but the model has "
        f"{embeddings} embeddings (ids 0 to {embeddings - 1}): use the tokenizer that the model was trained with, or "
        f"call model.resize_token_embeddings(len(tokenizer)) and save both"
    )


def load_model_config(model: ModelConfig, data: DataConfig | None = None) -> PretrainedConfig:
    """The architecture's configuration, dropout off: with dropout, two ranks could not give the loss of one.

    Raises `UserError` if it is unavailable, not a causal language model, or cannot take `data`: fewer than
    `data.max_length` tokens, or no documents packed into blocks.
    """
    model = located(model)
    if family := _tiny_family(model.name):
        tokenizer = _tiny_tokenizer(family)
        config = AutoConfig.for_model(
            family,
            vocab_size=TINY_VOCABULARY,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            # None: transformers gives a padding token a zero embedding that never trains, and here it is EOS as well.
            pad_token_id=None,
            **TINY_SHAPES[family],
        )
    else:
        try:
            config = AutoConfig.from_pretrained(model.name, revision=model.revision, token=token())
        except Exception as error:
            check_model_folder(model.name, with_weights=False)
            raise explain_hub_error(error, "model", model.name) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model.name={model.name}: a {config.model_type} model is not a causal language model")
    # Not what config.json may ask for: flash attention may be missing here, and others than SDPA attend to later tokens
    # if they get no mask, as in a pipeline. None: SDPA, or the plain implementation of a family that has no SDPA.
    config._attn_implementation = None
    for part, name in random_settings(config):
        setattr(part, name, 0.0)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if data is not None and longest and data.max_length > longest:
        raise UserError(
            f"data.max_length={data.max_length} is above what {model.name} takes: set it to {longest} or less"
        )
    if data is not None and data.packing == "documents":
        check_documents(config, data.max_length)
    return config


def random_settings(config: PretrainedConfig) -> list[tuple[PretrainedConfig, str]]:
    """The settings of `config` and its parts that make a model drop or shake its values at random while it trains."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))]
    words = ("drop", "jitter")  # attention_dropout, hidden_dropout_prob, layerdrop, resid_pdrop, router_jitter_noise …
    return [
        (part, name)
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, float) and any(word in name for word in words)
    ]


def architecture(config: PretrainedConfig) -> str:
    """What decides the shapes of the weights, as text."""
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    return (
        f"{config.model_type}: {config.num_hidden_layers} layers of width {config.hidden_size}/{inner}, "
        f"{config.num_attention_heads}/{getattr(config, 'num_key_value_heads', config.num_attention_heads)} heads, "
        f"vocabulary {config.vocab_size}, {'tied' if config.tie_word_embeddings else 'untied'}"
    )


def empty_model(model: ModelConfig) -> PreTrainedModel:
    """The model's modules without weights, on the `meta` device: what to shard before the weights are read."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_model_config(model), **{DTYPE_KEY: torch.float32})


def load_model(model: ModelConfig, seed: int = 0, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """The model on the CPU (or on the default device), weights in `dtype`. Raises `UserError` if it is unavailable.

    With `dtype="auto"` published weights stay in their file's type and are mapped, not copied, into memory.
    """
    model = located(model)
    config = load_model_config(model)
    if _tiny_family(model.name) or model.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random_dtype = torch.float32 if dtype == "auto" else dtype
            built = AutoModelForCausalLM.from_config(config, **{DTYPE_KEY: random_dtype})
    else:
        try:
            with _without_load_report():
                built, report = AutoModelForCausalLM.from_pretrained(
                    model.name,
                    revision=model.revision,
                    config=config,
                    token=token(),
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are in the report
                    **{DTYPE_KEY: dtype},
                )
        except Exception as error:
            check_model_folder(model.name)
            raise explain_hub_error(error, "model", model.name) from error
        if problem := load_problem(report):
            raise UserError(
                f"model.name={model.name}: its weights are not those of a {type(built).__name__} as config.json "
                f"describes it: {problem}; choose a complete checkpoint, or correct config.json"
            )
    return built


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers prints a table of what did not fit; here it becomes one line, or is fine."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_problem(report: dict[str, Any]) -> str | None:
    """The tensors that a checkpoint lacks or has too many, or in another shape; None if it fits.

    `report` is what `from_pretrained` gives with `output_loading_info`. Tensors that are missing start at random.
    """
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]]
    kinds = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"], "of another shape": mismatched}
    parts = []
    for kind, names in kinds.items():
        names = sorted(set(names) - (set() if kind == "of another shape" else set(mismatched)))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    return "; ".join([*parts, *report.get("error_msgs", [])[:1]]) or None


def base_folder(model: ModelConfig) -> Path | None:
    """A folder with all that the base's repository holds but its weights; None for a model that has no repository.

    Raises `UserError` if it is unavailable.
    """
    model = located(model)
    if model.name.startswith("tiny:"):
        return None
    if os.path.isdir(model.name):
        return Path(model.name)
    try:
        # Of folders only additional_chat_templates/ belongs to the model; others hold it in other formats.
        ignored = [*(f"*{ending}" for ending in WEIGHT_ENDINGS), "[!a]*/*", "a[!d]*/*"]
        where = {"revision": model.revision, "token": token(), "ignore_patterns": ignored}
        return Path(huggingface_hub.snapshot_download(model.name, **where))
    except Exception as error:
        raise explain_hub_error(error, "model", model.name) from error


def use_fused_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Repeat grouped key/value heads if PyTorch has no fused kernel for them, as on a T4.

    transformers hands grouped heads to scaled_dot_product_attention as they are. If neither the flash nor the cuDNN
    kernel runs, that falls back to one that holds the whole [length, length] matrix of every head; with the heads
    repeated, the memory-efficient kernel takes them.
    """
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", heads)
    if device.type != "cuda" or groups == heads or model.config._attn_implementation != "sdpa":
        return
    if not hasattr(transformers, "AttentionMaskInterface"):
        return  # transformers before 4.53 repeats them itself
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    query, key = (torch.empty(1, n, 16, width, device=device, dtype=dtype) for n in (heads, groups))
    call = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, True)
    if not (torch.backends.cuda.can_use_flash_attention(call) or torch.backends.cuda.can_use_cudnn_attention(call)):
        repeat_grouped_heads(model)


def repeat_grouped_heads(model: PreTrainedModel) -> None:
    """Make every attention layer of `model` repeat its key/value heads before scaled_dot_product_attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        causal = attention_mask is None and query.shape[2] > 1
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sdpa_repeated_heads", attention)
    AttentionMaskInterface.register("sdpa_repeated_heads", sdpa_mask)
    model.set_attn_implementation("sdpa_repeated_heads")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward, which computes the rest again.

    Raises `UserError` for a model that does not offer it.
    """
    # transformers gave the method a new name, and warns of the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"train.activation_checkpointing=true: {type(model).__name__} cannot; set it to false"
        ) from None


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's stack of decoder layers: the longest `ModuleList` in it, whatever the family calls it.

    Raises `UserError` if there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model.name: no list of decoder layers found in {type(model).__name__}")
    return max(lists, key=len)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices decay, vectors (norms and biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    dimensions = [len(getattr(p, "ds_shape", p.shape)) for p in parameters]  # ZeRO-3 leaves an empty row, and ds_shape
    return [
        {"params": [p for p, n in zip(parameters, dimensions, strict=True) if n >= 2], "weight_decay": weight_decay},
        {"params": [p for p, n in zip(parameters, dimensions, strict=True) if n < 2], "weight_decay": 0.0},
    ]


def small_groups(groups: list[dict[str, Any]], most: float) -> list[dict[str, Any]]:
    """The same parameter groups in pieces of at most `most` parameters, or of one tensor if that has more.

    ZeRO lays a group out in one row, and what else it needs in a step is as large as the largest group.
    """
    pieces = []
    for group in groups:
        numel = most + 1
        for parameter in group["params"]:
            numel += parameter.numel()
            if numel > most:
                pieces.append({**group, "params": []})
                numel = parameter.numel()
            pieces[-1]["params"].append(parameter)
    return pieces


def _tiny_family(name: str) -> str | None:
    if not name.startswith("tiny:"):
        return None
    family = name.removeprefix("tiny:")
    if family not in TINY_SHAPES:
        raise UserError(f"model.name={name}: the embedded models are " + ", ".join(f"tiny:{f}" for f in TINY_SHAPES))
    return family


@functools.cache
def _tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(tokenizer_models.BPE())
    # Qwen2's normalizer and splitting: transformers puts them in when it loads a saved Qwen2 tokenizer, whatever the
    # file holds, and the saved tokenizer must give the same ids as this one.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in pydoc_data.rows()[::4]], trainer)
    begins = family in ("llama", "opt")  # like the real ones, these put a BOS before a text
    if begins:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.token_to_id(special[0]))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0] if begins else None,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
        chat_template=CHATML,
        model_max_length=TINY_SHAPES[family].get("max_position_embeddings", 1024),
        clean_up_tokenization_spaces=False,
    )
