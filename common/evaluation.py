"""The held-out loss, during training and in `eval.py`, with the same value on any number of ranks.

Batches are cut before they are distributed to the ranks, and sums and counts are reduced, never means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.data import TokenizedRows, collate
from common.errors import UserError
from common.loss import IGNORE, CausalLMLoss
from common.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def held_out_batches(
    rows: TokenizedRows, batch_size: int, pad_id: int, rank: int = 0, world_size: int = 1
) -> list[dict[str, Tensor]]:
    """One rank's batches {"input_ids", "labels"}, int64 [batch, longest]; over all ranks every row is in one of them.

    Rows are sorted by length, so that little is padded, and cut into batches that are distributed whole, longest first.
    A batch is thus the same tensor, with the same loss to the last bit, whichever rank gets it. Every other round is
    reversed, so that no rank always gets the longest. Every rank gets the same number of batches, since a
    sharded model's forward pass is a collective: if the last round is short, the rest get one row without targets.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    batches = [
        collate([rows[i] for i in order[at : at + batch_size]], pad_id) for at in range(0, len(rows), batch_size)
    ]
    shortest = collate([rows[order[-1]]], pad_id)
    filler = {**shortest, "labels": torch.full_like(shortest["labels"], IGNORE)}
    batches += [filler] * (-len(batches) % world_size)
    rounds = [batches[at : at + world_size] for at in range(0, len(batches), world_size)]
    return [batch[-1 - rank if turn % 2 else rank] for turn, batch in enumerate(rounds)]


@torch.no_grad()  # not inference_mode: FSDP's gathered parameters would become inference tensors and spoil training
def evaluate(
    model: CausalLMLoss, batches: Sequence[dict[str, Tensor]], device: torch.device, progress: str = ""
) -> Tensor:
    """This rank's sums over `batches`, float64 [3] on `device`: token losses in nats, targets, targets predicted right.

    The caller reduces them over the ranks. `progress` is the label of a progress bar; empty: none.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in track(batches, progress, "batch", len(batches), shown=bool(progress)):
        total += model(batch["input_ids"].to(device), batch["labels"].to(device), statistics=True)
    model.train(was_training)
    return total


def predicted_bytes(rows: TokenizedRows, tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes of the text that the targets of `rows` spell; special tokens, as EOS, spell none."""
    texts = (
        tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for labels in (row["labels"][1:] for row in rows)  # a sequence's first token is predicted from nothing
    )
    return sum(len(text.encode()) for text in texts)


def figures(sums: Tensor, text_bytes: int) -> dict[str, float]:
    """Loss (nats per token), perplexity, token accuracy and bits per byte from the reduced sums of `evaluate`.

    Bits per byte divides by the bytes of the text, which no tokenizer changes; the loss divides by its tokens
    (The Pile, https://arxiv.org/abs/2101.00027, section 3.1). Raises `UserError` if the loss is not finite.
    """
    total, targets, right = sums.tolist()
    loss = total / targets
    if not math.isfinite(loss):
        raise UserError(
            f"the held-out loss is {loss}: if the base model's is, set train.precision=fp32 (fp16 overflows in some "
            f"models); if only the fine-tuned model's is, its training diverged: lower train.learning_rate"
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # above 709 a float overflows
        "token_accuracy": right / targets,
        "bits_per_byte": total / math.log(2) / max(text_bytes, 1),
        "tokens": int(targets),
        "bytes": text_bytes,
    }
