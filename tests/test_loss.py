"""The loss in chunks: value and gradients are those of a plain cross-entropy over the full logits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, refused
from families import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import loss as loss_module
from common.config import ModelConfig
from common.errors import UserError
from common.loss import (
    IGNORE,
    CausalLMLoss,
    check_loss,
    chunked_losses,
    count_targets,
    linear_cross_entropy,
    own_head_losses,
)
from common.models import empty_model, load_model, random_settings
from common.small_model import randomize

VOCABULARY, WIDTH = 50, 16


@pytest.fixture(params=[1, 3, 7, 1000], ids=lambda rows: f"{rows}-tokens-a-chunk")
def chunk(request, monkeypatch):
    """Chunks of a given size: one token, ragged, all in one (as FEWEST_CHUNKS would never have it)."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", request.param * VOCABULARY)
    monkeypatch.setattr(loss_module, "FEWEST_CHUNKS", 1)
    return request.param


def problem(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def reference(hidden, weight, targets):
    """Loss and gradients in float64, over the full logits."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tokens", [1, 20])
def test_value_and_gradients_are_those_of_cross_entropy(chunk, tokens):
    hidden, weight, targets = problem(tokens)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    for ours, theirs in zip((loss, hidden.grad, weight.grad), reference(hidden, weight, targets), strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, theirs) < 1e-6


def test_chunks_are_as_many_as_they_should_be(monkeypatch):
    targets = torch.zeros(100, dtype=torch.long)
    hidden = torch.zeros(100, WIDTH)
    sizes = [len(rows) for rows, _ in loss_module._chunks(hidden, targets, VOCABULARY)]
    assert sizes == [100], "so few are not worth a cut"
    monkeypatch.setattr(loss_module, "SMALLEST_CHUNK", 10)
    sizes = [len(rows) for rows, _ in loss_module._chunks(hidden, targets, VOCABULARY)]
    assert sizes == [13] * 7 + [9], "a small batch, too, is cut"
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 7 * VOCABULARY + 1)
    assert {len(rows) for rows, _ in loss_module._chunks(hidden, targets, VOCABULARY)} == {7, 2}
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", VOCABULARY - 1)
    assert {len(rows) for rows, _ in loss_module._chunks(hidden, targets, VOCABULARY)} == {1}


def test_no_targets_give_zero_and_zero_gradients():
    hidden, weight, targets = problem(0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, WIDTH)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_an_upstream_gradient_scales_the_gradients(chunk):
    hidden, weight, targets = problem(20)
    (linear_cross_entropy(hidden, weight, targets) * 1024 / 7).backward()  # as a loss scale over a number of targets
    _, hidden_grad, weight_grad = reference(hidden, weight, targets)
    assert relative(hidden.grad, hidden_grad * 1024 / 7) < 1e-6
    assert relative(weight.grad, weight_grad * 1024 / 7) < 1e-6


def test_gradients_accumulate_and_a_second_backward_is_refused():
    hidden, weight, targets = problem(20)
    _, _, weight_grad = reference(hidden, weight, targets)
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward(retain_graph=True)
    assert relative(weight.grad, 2 * weight_grad) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # and not a wrong gradient
        loss.backward()


def test_gradients_of_one_input_only():
    hidden, weight, targets = problem(20)
    _, hidden_grad, weight_grad = reference(hidden, weight, targets)
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert relative(hidden.grad, hidden_grad) < 1e-6
    assert relative(weight.grad, weight_grad) < 1e-6


def test_under_bf16_autocast_it_is_as_exact_as_cross_entropy_is(chunk):
    hidden, weight, targets = problem(500)
    hidden.data = hidden.data.bfloat16().float()  # what the model hands over under autocast
    true_loss, true_hidden, true_weight = reference(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
        plain_hidden, plain_weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        plain = F.cross_entropy(F.linear(plain_hidden, plain_weight), targets, reduction="sum")
    ours.backward()
    plain.backward()
    assert (ours.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    assert relative(ours, true_loss) < 1e-3
    assert relative(hidden.grad, true_hidden) < max(1.2 * relative(plain_hidden.grad, true_hidden), 5e-3)
    assert relative(weight.grad, true_weight) < max(1.2 * relative(plain_weight.grad, true_weight), 5e-3)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_without_gradients_only_the_logits_are_computed(monkeypatch):
    monkeypatch.setattr(loss_module, "SMALLEST_CHUNK", 1)
    hidden, weight, targets = problem(80)
    with Products() as with_gradients:
        loss = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Products() as without:
        same = linear_cross_entropy(hidden, weight, targets)
    assert (with_gradients.count, without.count) == (3 * 8, 8)
    assert torch.equal(loss, same)
    assert not same.requires_grad


# --- whole models ---------------------------------------------------------------------------------------------------

LENGTHS = ((9, 4), (3, 0), (12, 11), (6, 2))  # of rows, and of the prompts in them; (3, 0): all but its first token


def rows_of(vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, prompt in LENGTHS:
        ids = torch.randint(3, vocabulary, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, :prompt] = IGNORE
        rows.append((ids, labels))
    return rows


def batch_of(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded, as `collate` does it, with 0 as the pad token."""
    longest = max(ids.shape[1] for ids, _ in rows)
    ids, labels = (
        torch.cat([F.pad(row[i], (0, longest - row[i].shape[1]), value=value) for row in rows])
        for i, value in ((0, 0), (1, IGNORE))
    )
    return ids, labels


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_has_the_loss_and_gradients_of_its_rows_one_by_one(family):
    model = load_model(ModelConfig(f"tiny:{family}"), seed=1)
    rows = rows_of(model.config.vocab_size)
    expected = 0.0
    for ids, labels in rows:  # transformers' own loss, a mean over the row's targets
        loss = model(input_ids=ids, labels=labels).loss * count_targets(labels)
        loss.backward()
        expected += loss.item()
    theirs = gradients(model)

    loss = CausalLMLoss(model)(*batch_of(rows))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    whole = torch.cat([g.flatten() for g in theirs.values()]).norm()
    for name in theirs:
        # A key's bias moves all scores of a query alike: its true gradient is 0, and rounding is all that is there.
        assert (ours[name] - theirs[name]).norm() < 1e-5 * theirs[name].norm() + 1e-6 * whole, name


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_loss_targets_and_right_guesses(family):
    model = load_model(ModelConfig(f"tiny:{family}"), seed=1).eval()
    rows = rows_of(model.config.vocab_size)
    ids, labels = batch_of(rows)
    guesses = model(input_ids=ids).logits.argmax(-1)
    labels[2, -1] = guesses[2, -2]  # one that is certainly right
    wanted = labels[:, 1:] != IGNORE
    right = (guesses[:, :-1] == labels[:, 1:])[wanted].sum()
    assert right > 0

    loss = CausalLMLoss(model)
    statistics = loss(ids, labels, statistics=True)
    assert statistics.dtype == torch.float64
    assert statistics[0].item() == pytest.approx(loss(ids, labels).item(), rel=1e-6)
    assert statistics[1:].tolist() == [wanted.sum(), right]
    assert statistics[1] == count_targets(labels)
    assert not statistics.requires_grad

    nothing = torch.full_like(labels, IGNORE)
    assert loss(ids, nothing, statistics=True).tolist() == [0, 0, 0]


def test_targets_are_counted_as_the_loss_counts_them():
    assert [count_targets(labels) for _, labels in rows_of(99)] == [
        length - max(1, prompt) for length, prompt in LENGTHS
    ]
    assert count_targets(batch_of(rows_of(99))[1]) == 5 + 2 + 1 + 4


def test_a_batch_without_targets_has_a_loss_of_zero_that_can_go_backward():
    model = load_model(ModelConfig("tiny:qwen2"), seed=1)
    ids, labels = batch_of(rows_of(model.config.vocab_size))
    loss = CausalLMLoss(model)(ids, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


SHAPES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
          "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}


def model_of(family: str, **keys):
    config = AutoConfig.for_model(family, **SHAPES | keys)
    for part, name in random_settings(config):
        setattr(part, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model)
    return model


def assert_the_model_s_own(model) -> None:
    """Value, gradient of the head and statistics of our loss are those of transformers, on a batch with masked rows."""
    ids, labels = batch_of(rows_of(64))
    own = model(input_ids=ids, labels=labels, use_cache=False).loss * count_targets(labels)
    head = model.get_output_embeddings().weight
    (own_gradient,) = torch.autograd.grad(own, head)
    ours = CausalLMLoss(model)
    loss = ours(ids, labels)
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert relative(*torch.autograd.grad(loss, head), own_gradient) < 1e-4
    statistics = ours(ids, labels, statistics=True)
    assert statistics.dtype == torch.float64 and not statistics.requires_grad
    assert statistics[0].item() == pytest.approx(own.item(), rel=1e-5)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    right = (logits.argmax(-1) == labels[:, 1:]).sum()
    assert statistics[1:].tolist() == [count_targets(labels), right]


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("falcon_h1", MAMBA | {"lm_head_multiplier": 0.0390625}),
        ("phi", {}),  # a bias
        ("cohere", {"logit_scale": 0.1}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("gemma2", {"final_logit_softcapping": 30.0, "tie_word_embeddings": False}),
        ("nanochat", {}),  # a cap that no setting names
        ("modernbert-decoder", {}),  # a transformation before the head
        ("bert", {"is_decoder": True}),  # the same, and a bias
    ],
)
def test_models_that_change_their_logits_train_on_their_own_loss(family, keys, capsys):
    model = model_of(family, **keys)
    assert_the_model_s_own(model)
    note = capsys.readouterr().err
    assert type(model).__name__ in note and "train.micro_batch_size" in note
    assert CausalLMLoss(model).losses is own_head_losses


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "gpt_neox", "mpt", "mamba", "falcon_h1"])
def test_models_with_a_plain_head_never_hold_their_logits(family, capsys):
    model = model_of(family, **(MAMBA if family == "falcon_h1" else {}))
    assert_the_model_s_own(model)
    assert CausalLMLoss(model).losses is chunked_losses
    assert not capsys.readouterr().err


def test_the_check_needs_no_weights_and_leaves_the_random_numbers_as_they_were():
    state = torch.get_rng_state()
    for name, wanted in (("tiny:llama", chunked_losses), ("tiny:bloom", chunked_losses)):
        assert check_loss(empty_model(ModelConfig(name))) is wanted
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("family", "keys", "why"),
    [
        ("mixtral", {"output_router_logits": True, "num_local_experts": 4}, "another loss"),  # adds a term
        ("bart", {"d_model": 16, "decoder_ffn_dim": 32, "decoder_layers": 1}, "another loss"),  # does not shift labels
        ("bert", {}, "those after it"),
        (
            "git",
            {"vision_config": {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}},
            "cannot be trained here",
        ),  # wants an image
    ],
)
def test_models_with_another_loss_are_refused(family, keys, why):
    model = model_of(family, **keys)
    with refused("model.name", type(model).__name__, why, "choose another model"):
        CausalLMLoss(model)


@pytest.mark.slow
def test_every_causal_model_of_transformers_trains_on_its_own_loss_or_is_refused():
    equal, refusals = [], []
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if (model := tiny_model(family)) is None:
            continue
        try:
            CausalLMLoss(model)
        except UserError as error:
            assert "\n" not in str(error), family
            refusals.append(family)
            continue
        assert_the_model_s_own(model)
        equal.append(family)
    assert len(equal) > 80, equal
    known = {"bert", "bart", "whisper", "marian", "trocr"} & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert known <= set(refusals)
    assert {"llama", "qwen2", "opt", "bloom", "gemma2", "mixtral", "gpt2"} <= set(equal)
