"""Tiny models of every causal language model class that the installed transformers has, for tests of the whole kind."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.models import random_settings
from common.small_model import randomize

SMALL = {
    32: ("hidden_size", "d_model", "n_embd", "n_embed", "word_embed_proj_dim", "embedding_size"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_key_value_heads", "linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"),
    4: ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"),
    8: ("head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
    16: ("moe_intermediate_size", "chunk_size", "mamba_chunk_size", "mamba_d_ssm", "mamba_d_state", "mamba_d_head"),
    64: ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "vocab_size", "max_position_embeddings",
         "n_positions"),
}  # fmt: skip
LARGEST = 3_000_000  # parameters


def tiny_model(family: str) -> PreTrainedModel | None:
    """A model of `family` (a `model_type`) with random weights that matter; None if it cannot be built small."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in shape.parameters()) > LARGEST:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            randomize(model)
    except Exception:  # these shapes do not go together in this family
        return None
    return model


def tiny_config(family: str) -> PretrainedConfig:
    config = AutoConfig.for_model(family)
    inner = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    for part in {id(part): part for part in (config, config.get_text_config(), *inner)}.values():
        for value, names in SMALL.items():
            for name in names:
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, value)
        for name, value in list(vars(part).items()):
            if name.endswith("token_id") and isinstance(value, int | list):
                setattr(part, name, 0)
            elif name.endswith("types") and isinstance(value, list):  # one for each layer
                setattr(part, name, value[:2])
    for part, name in random_settings(config):
        setattr(part, name, 0.0)
    return config
