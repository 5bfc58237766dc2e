"""Whole documents side by side in blocks: `data.packing=documents`.

    block 0   │ document 7 ················ │ document 2 ······ │ 5 · │    each token attends to its own document only
    positions │ 0 1 2 3 4 5 6 7 8 9 10 11 … │ 0 1 2 3 4 5 6 7 … │ 0 1 │       (common/document_attention.py)

A document is a row as `tokenize` gives it: a text, a prompt with its response, or a conversation, cut at
`data.max_length`. It trains as it would alone. Positions restart, attention stays inside the document, and its first
token is never a target, so that the loss of a block is the sum of the losses of its documents.

A block is one sequence of the global batch: `train.global_batch_size=16` takes 16 blocks per step, and so more
documents than unpacked. Blocks are packed once, from the rows in the order that the seed decides. From then on they are
treated as rows: shuffled by seed and epoch, sorted by length within a step, distributed to the ranks. N ranks see
exactly the blocks that one would, and the position to resume from is a function of the step. Loss and gradients are
divided by the number of target tokens of the global batch, as always.

Blocks are stored without padding. A micro-batch is padded to its longest block, and each padded place counts as a
document of one token. Held-out rows are never packed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from common.loss import IGNORE


class Blocks(NamedTuple):
    """Documents in the order of their blocks."""

    tokens: np.ndarray  # int32 [all tokens]
    labels: np.ndarray  # int32 [all tokens]; a document's first token is no target
    positions: np.ndarray  # int32 [all tokens]: in the document
    offsets: np.ndarray  # int64 [blocks + 1]


def pack_documents(tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, size: int) -> Blocks:
    """Pack documents, in flat arrays, into blocks of at most `size` tokens. `offsets` int64 [documents + 1]."""
    lengths = np.diff(offsets)
    blocks = best_fit_decreasing(lengths, size)
    order = np.concatenate([np.array(block) for block in blocks])
    starts = np.cumsum(lengths[order]) - lengths[order]  # of the documents, where they are put
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths[order])
    source = positions + np.repeat(offsets[:-1][order], lengths[order])
    labels = np.where(positions == 0, IGNORE, labels[source]).astype(labels.dtype)
    filled = [lengths[block].sum() for block in blocks]
    return Blocks(tokens[source], labels, positions.astype(np.int32), np.concatenate([[0], np.cumsum(filled)]))


def best_fit_decreasing(lengths: np.ndarray, size: int) -> list[list[int]]:
    """The indices of `lengths` by block. No length is more than `size`, and no block's sum.

    The longest first, each into the fullest block that still has room for it.
    """
    blocks: list[list[int]] = []
    with_space: dict[int, list[list[int]]] = defaultdict(list)  # blocks by the places that are left in them
    spaces: list[int] = []  # the keys that have a block, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if (at := bisect_left(spaces, length)) < len(spaces):
            space = spaces[at]
            block = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        else:
            space, block = size, []
            blocks.append(block)
        block.append(i)
        if left := space - length:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(block)
    return blocks


def documents_of(row: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The documents of a block, each as a row by itself; a row that is not packed is the only one of its own."""
    if "position_ids" not in row:
        return [row]
    lengths = torch.diff(torch.nonzero(row["position_ids"] == 0).flatten(), append=torch.tensor([len(row["labels"])]))
    parts = [row[name].split(lengths.tolist()) for name in ("input_ids", "labels")]
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(*parts, strict=True)]
