"""Small tokenizers and chat templates in the shapes of the published ones, made in a moment."""

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from common import pydoc_data

# Words that begin or end a turn in one family or another: each tokenizer knows them all, as it knows BOS and EOS.
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
]  # fmt: skip
SAMPLE = [row["text"] for row in pydoc_data.rows()[::20]] + ["f(x): g( y ) = [1, 2]; a-b_c. " * 40]


def _byte_level(trim_offsets: bool = True, add_prefix_space: bool = False, words: bool = True) -> Tokenizer:
    """GPT-2's kind. Without splitting at words, merges go across all borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>"], show_progress=False, max_token_length=16,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(SAMPLE, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Llama-2's kind: spaces are letters, one is put before each text, and bytes stand in for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """T5's and newer Llamas' kind: a unigram model over words that begin with their space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


KINDS = {
    "byte-level": functools.partial(_byte_level, trim_offsets=False),
    "byte-level, offsets without spaces": _byte_level,
    "byte-level, a space in front": functools.partial(_byte_level, add_prefix_space=True),
    "byte-level, merges across words": functools.partial(_byte_level, trim_offsets=False, words=False),
    "sentencepiece": _sentencepiece,
    "metaspace": _metaspace,
}


@functools.cache
def tokenizer_of_kind(kind: str, adds: str = "") -> PreTrainedTokenizerFast:
    """`adds`: what the tokenizer puts around a text by itself, of "bos" and "eos"."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    if adds:
        template = ["<s>"] * ("bos" in adds) + ["$A"] + ["</s>"] * ("eos" in adds)
        ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        around = processors.TemplateProcessing(single=" ".join(template), special_tokens=ids)
        earlier = [tokenizer.post_processor] if tokenizer.post_processor else []
        tokenizer.post_processor = processors.Sequence([*earlier, around])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.add_tokens(MARKS, special_tokens=True)
    return fast


@functools.cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


# Six families' shapes and two of no family. {% generation %} stands where the assistant's words do; `without_marks`
# takes it out, as published templates have none.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smollm": (  # ChatML, with a system prompt if the conversation has none
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama-3": (  # BOS, a date in the system prompt, trimmed contents
        "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '1 Jan 1970' %}{% endif %}"
        "{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content|trim }}{% endif %}{{ '<|eot_id|>' }}"
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content|trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content|trim + '<|eot_id|>' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (  # the assistant is called model, contents are trimmed, a system prompt stands in the first user's turn
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content + '\n\n' %}{% elif m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ m.content|trim + '<end_of_turn>\n' }}{% endgeneration %}{% else %}"
        "{{ '<start_of_turn>user\n' + ns.system + m.content|trim + '<end_of_turn>\n' }}{% set ns.system = '' %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (  # no generation prompt; EOS ends a turn
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "phi-3": (  # EOS follows the last turn only, and belongs to nobody: the mask leaves it out
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "words": (  # no special tokens: tokens join what stands on both sides of every border
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    ),
}


def without_marks(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
