"""Greedy answers to the held-out prompts, and how close they come to the references."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from common.config import DataConfig
from common.data import Prompt, prompt_and_reference, prompt_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


MOST_PROMPT_CHARACTERS = 160  # of a text that is to be continued: two lines on a screen


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
    """Token ids of `prompt` as in training; if there are more than `longest`, the last ones, next to the answer."""
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


def without_rest(rest: str, answer: str) -> str:
    """`answer` without the end of the prompt that it begins with; decoding may have dropped a space in front."""
    return answer.lstrip().removeprefix(rest.lstrip()) if rest else answer
