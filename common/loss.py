"""Next-token loss that never holds the full logits.

At a vocabulary of 152k, the fp32 logits of 4 × 512 tokens are 1.2 GB, and a plain cross-entropy holds several tensors
of that size. Here the output head and the cross-entropy run on a few hundred to a few thousand tokens at a time, and
each chunk's gradient is computed while its logits are at hand, so that no logits outlive their chunk. The idea is Liger
Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989, section 3.2); here in plain PyTorch, so that one
code serves CPU and GPU, with the gradient of the head's weight summed in fp32.

The loss is a *sum*: divide by the number of target tokens of the whole global batch, and it is exact for any split into
ranks and micro-batches.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from common.document_attention import document_inputs, restart_alibi
from common.errors import UserError
from common.small_model import small_copies, transformers_class

IGNORE = -100  # the label of a token that is not a target, as in PyTorch and transformers
CHUNK_LOGITS = 2**29  # logits a chunk holds at most: 1 GiB in bf16
FEWEST_CHUNKS = 8  # so that a small batch, too, needs a fraction of the memory
# In tokens. Each chunk reads and writes the whole gradient of the head: for Llama-3.2-1B 2 GB, 7 ms at a T4's 300 GB/s.
# The products of 256 tokens take it about as long, at 65 TFLOP/s.
SMALLEST_CHUNK = 256


class CausalLMLoss(nn.Module):
    """A Hugging Face causal language model whose forward returns the summed loss, under autocast to `autocast`.

    It is the loss that the model itself would return: `check_loss` has compared the two. A wrapper such as DDP must see
    every parameter used inside `forward`: the output head's included.

    Raises `UserError` for a model whose loss cannot be computed as a sum over its tokens.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype = torch.float32):
        super().__init__()
        self.autocast = autocast
        self.losses = check_loss(model)
        if self.losses is own_head_losses and os.environ.get("RANK", "0") == "0":
            print(
                f"note: {_class_name(model)} changes its logits after the output matrix, so its own head computes the "
                f"loss. All logits of a micro-batch exist at once: if memory runs out, lower train.micro_batch_size",
                file=sys.stderr,
            )
        restart_alibi(model)
        self.model = model

    def forward(
        self, input_ids: Tensor, labels: Tensor, statistics: bool = False, position_ids: Tensor | None = None
    ) -> Tensor:
        """Sum of the token losses, fp32 scalar; with `statistics`, what `token_statistics` gives.

        `input_ids` and `labels` are int64 [batch, length]; labels are not shifted. So are `position_ids`, of rows that
        are blocks of several documents: 0, 1, 2 … in each.
        """
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast != torch.float32):
            return self.losses(self.model, input_ids, labels, statistics, position_ids)


def chunked_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    statistics: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The loss from the last hidden states and the matrix of the output head: the full logits never exist."""
    decoder = model.base_model
    inputs = document_inputs(decoder, position_ids)
    hidden = decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
    return token_losses(hidden, model.get_output_embeddings().weight, labels, statistics)


def own_head_losses(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    statistics: bool = False,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The loss from the logits that the model computes, whatever it does to them. They are all there at once."""
    logits = model(input_ids=input_ids, use_cache=False, **document_inputs(model, position_ids)).logits
    shifted = labels[:, 1:].flatten()
    is_target = (shifted != IGNORE).nonzero().squeeze(1)
    logits, targets = logits[:, :-1].flatten(0, 1)[is_target].float(), shifted[is_target]
    if statistics:
        logits = logits.detach()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    if not statistics:
        return loss
    right = (logits.argmax(-1) == targets).sum()
    return torch.stack([loss.double(), torch.full_like(loss, len(targets)).double(), right.double()])


def check_loss(model: nn.Module) -> Callable[..., Tensor]:
    """`chunked_losses` or `own_head_losses`: the first whose value and gradients are those of `model`'s own loss.

    Families scale, cap, shift or transform their logits, each in its own way: so the losses are compared, on a batch of
    a few tokens and a small copy of the model. Raises `UserError` if neither agrees, and if the model attends to later
    tokens, which would make the loss of a padded batch another one.
    """
    problem: Exception = ValueError("it cannot be built from its configuration alone")
    for small in small_copies(model):
        try:
            return _agreeing_losses(small)
        except UserError:
            raise
        except Exception as error:  # a family that cannot be computed at this size
            problem = error
    raise UserError(
        f"model.name: {_class_name(model)} cannot be trained here, its loss for token ids alone cannot be computed: "
        f"{(str(problem) or type(problem).__name__).splitlines()[0]}; choose another model"
    ) from problem


@torch.enable_grad()  # even if the caller only evaluates
def _agreeing_losses(small: nn.Module) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, other_ids = torch.randint(1, small.config.get_text_config().vocab_size, (2, 2, 16), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[1, -3:] = IGNORE  # a prompt and padding: rows with unequal numbers of targets
    small.train()
    own = small(input_ids=ids, labels=labels, use_cache=False).loss * count_targets(labels)
    own_gradients = _gradients(own, small)
    for losses in (chunked_losses, own_head_losses):
        try:
            loss = losses(small, ids, labels)
            gradients = _gradients(loss, small)
        except (AttributeError, TypeError):  # no head of its own, no `last_hidden_state`
            if losses is own_head_losses:
                raise
            continue
        if _near(loss, own, 1e-4) and all(map(_near, gradients, own_gradients)):
            break
    else:
        count = count_targets(labels)
        raise UserError(
            f"model.name: {_class_name(small)} computes another loss than the cross-entropy of the next token "
            f"({own / count:.4f} and {loss / count:.4f} for the same tokens), which is what is trained and compared "
            f"here; choose another model, or switch off the term that its config.json adds"
        )
    labels[:, 8:] = IGNORE
    other_ids[:, :8] = ids[:, :8]
    if not _near(losses(small, ids, labels), losses(small, other_ids, labels), 1e-5):
        raise UserError(
            f"model.name: {_class_name(small)} predicts a token from those after it, as it is configured: it is not "
            f"a causal language model (is_decoder=true in its config.json?); choose another model"
        )
    return losses


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The gradients of the output head and of all parameters, as two vectors."""
    head = model.get_output_embeddings()
    head = [] if head is None else [p for p in head.parameters() if p.requires_grad]
    every = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, head + every, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(head + every, gradients, strict=True)]
    return [torch.cat([g.flatten() for g in part]) for part in (whole[: len(head)] or whole, whole[len(head) :])]


def _near(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return bool(a.isfinite().all() and (a - b).norm() <= tolerance * b.norm())


def _class_name(model: nn.Module) -> str:
    return transformers_class(model).__name__


def token_losses(hidden: Tensor, head: Tensor, labels: Tensor, statistics: bool = False) -> Tensor:
    """Sum of the token losses of `labels` [batch, length], not shifted, given the last hidden states and the head.

    With `statistics`, what `token_statistics` gives.
    """
    shifted = labels[:, 1:].flatten()
    is_target = (shifted != IGNORE).nonzero().squeeze(1)  # masked prompts do not pay for the head
    compute = token_statistics if statistics else linear_cross_entropy
    return compute(hidden[:, :-1].flatten(0, 1)[is_target], head, shifted[is_target])


def count_targets(labels: Tensor) -> int:
    """Tokens of `labels` [batch, length] that have a loss: all but the first of a sequence and the masked ones."""
    return int((labels[:, 1:] != IGNORE).sum())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross_entropy(hidden @ weight.T, targets), fp32 scalar, computed in chunks.

    hidden [tokens, width], weight [vocabulary, width], targets [tokens] (no masked ones). Under autocast the products
    run in autocast's type, as `nn.Linear`'s would; the weight's gradient stays in the weight's own type.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, _compute_dtype(hidden, weight), torch.is_grad_enabled())


@torch.no_grad()
def token_statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """float64 [3]: sum of the token losses, number of targets, number of targets that were the likeliest token.

    Takes what `linear_cross_entropy` takes, and computes in chunks as it does.
    """
    weight = weight.to(_compute_dtype(hidden, weight))
    total = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    for rows, wanted in _chunks(hidden, targets, len(weight)):
        logits = (rows.to(weight.dtype) @ weight.T).float()
        total[0] += F.cross_entropy(logits, wanted, reduction="sum").double()
        total[2] += (logits.argmax(-1) == wanted).sum()
    total[1] = len(targets)
    return total


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def chunk_size(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits are there at a time."""
    size = max(SMALLEST_CHUNK, -(-tokens // FEWEST_CHUNKS))
    return max(1, min(size, tokens, CHUNK_LOGITS // vocabulary))


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int):
    size = chunk_size(len(targets), vocabulary)
    return zip(hidden.split(size), targets.split(size), strict=True) if len(targets) else ()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, with_gradient: bool):
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if with_gradient:
            grad_rows = torch.empty_like(rows)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        start = 0
        for chunk, wanted in _chunks(rows, targets, len(matrix)):
            logits = chunk @ matrix.T
            loss += _loss_then_gradient(logits.device.type)(logits, wanted)
            if with_gradient:
                torch.mm(logits, matrix, out=grad_rows[start : start + len(chunk)])
                _add_product(grad_weight, logits.T, chunk)
            start += len(chunk)
        if with_gradient:
            ctx.save_for_backward(grad_rows, grad_weight)
            ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        # grad_loss carries 1 / targets and the fp16 loss scale. They are as well applied here as in the forward:
        # softmax - one-hot lies in [-1, 1], and what was summed over tokens was summed in fp32. In fp32, for 16 bits
        # would round the factor itself; in place for the weight's gradient, the largest tensor of the step.
        grad_rows, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            grad_rows.float().mul_(grad_loss).to(hidden_dtype),
            grad_weight.mul_(grad_loss).to(weight_dtype),
            None,
            None,
            None,
        )


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy (fp32) of logits [n, vocabulary], which become its gradient: softmax - one-hot, in place."""
    scores = logits.float()
    log_sum = scores.logsumexp(-1, keepdim=True)
    loss = (log_sum - scores.gather(1, targets[:, None])).sum()
    columns = torch.arange(logits.shape[1], device=logits.device)
    logits.copy_((scores - log_sum).exp() - (columns == targets[:, None]).float())
    return loss


@functools.cache
def _loss_then_gradient(device: str) -> Callable[[Tensor, Tensor], Tensor]:
    # On a GPU these elementwise passes over the logits cost as much as the products unless they are fused into one
    # kernel; on a CPU they do not matter. Fusing takes Triton, and Triton a C compiler and Python's headers.
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return torch.compile(_to_gradient) if device == "cuda" and has_triton() and compiler and headers else _to_gradient


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (fp32) += a @ b, without rounding the product to the type of a and b if the hardware can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8 and later
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
