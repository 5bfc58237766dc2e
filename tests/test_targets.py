"""What is learned, token by token, over random texts, conversations, chat templates and tokenizers.

The oracle of conversations is transformers' own assistant mask; that of prompts and responses, the bytes of each token.
"""

import functools
from itertools import accumulate

import datasets
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_made import KINDS, MARKS, TEMPLATES, tokenizer_of_kind, without_marks

from common.chat import assistant_spans
from common.config import DataConfig
from common.data import prompt_and_reference, prompt_tokens, tokenize
from common.generation import encode_prompt
from common.loss import IGNORE

EXACT = "byte-level"  # the kind whose offsets leave nothing out, with the vocabulary of the second
TRIMMED = "byte-level, offsets without spaces"
TODAY = "2024-07-26"
PIECES = [
    " ",
    "  ",
    "\n",
    "\t",
    "f",
    "x",
    "(",
    "):",
    "word",
    " the",
    "2024-01-02",
    "é",
    "e\u0301",
    "中",
    "🙂",
    "\u2028",
    "Q:",
    "'s",
]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
wild_texts = st.lists(st.sampled_from([*PIECES, *MARKS, "</s>", "<s>"]), max_size=8).map("".join)
thorough = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def conversations(draw) -> list[dict[str, str]]:
    """Of any shape with an assistant in it: opened by the system, the user or the assistant, turns twice in a row."""
    turns = [*draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5)), "assistant"]
    turns += draw(st.lists(st.just("user"), max_size=1))
    roles = draw(st.sampled_from([[], ["system"]])) + turns
    return [{"role": role, "content": draw(wild_texts) + draw(st.sampled_from("xy"))} for role in roles]


def encoded(row: dict, tokenizer, **keys) -> tuple[list[int], list[bool]]:
    rows = tokenize(datasets.Dataset.from_list([row]), DataConfig(max_length=100_000, **keys), tokenizer)
    ids, labels = (rows[0][name].tolist() for name in ("input_ids", "labels"))
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    return ids, [label != IGNORE for label in labels]


@functools.cache
def chat_tokenizer(kind: str, template: str):
    tokenizer = tokenizer_of_kind(kind)
    return tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize("family", TEMPLATES)
@thorough
@given(
    messages=conversations(), kind=st.sampled_from([kind for kind in KINDS if kind != "byte-level, a space in front"])
)
def test_of_a_marked_conversation_the_targets_are_transformers_assistant_mask(family, messages, kind):
    tokenizer = chat_tokenizer(kind, TEMPLATES[family])
    # transformers cannot place a token whose offsets leave out its space; the tokens are those of the exact twin.
    twin = chat_tokenizer(EXACT, TEMPLATES[family]) if kind == TRIMMED else tokenizer
    ids, targets = encoded({"messages": messages}, tokenizer, format="messages")
    if messages[-1]["role"] != "assistant":
        messages = messages[:-1]  # nothing of what nobody answers is learned
        assert (ids, targets) == encoded({"messages": messages}, tokenizer, format="messages")
    expected = twin.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, date_string="26 Jul 2024",
        tokenizer_kwargs={"return_offsets_mapping": True},
    )  # fmt: skip
    mask, spans = expected["assistant_masks"], expected["offset_mapping"]
    for i in range(1, len(mask)):  # of the tokens that share a span's last character it marks the first only
        mask[i] |= mask[i - 1] and spans[i][0] < spans[i - 1][1]
    assert ids == expected["input_ids"]
    assert targets == [bool(each) for each in mask]


@pytest.mark.parametrize("family", TEMPLATES)
@thorough
@given(messages=conversations())
def test_without_marks_the_same_words_are_found(family, messages):
    """From the template's own renderings, for any shape of conversation; a turn may end with its EOS and new line."""
    marked, plain = (
        chat_tokenizer(EXACT, template) for template in (TEMPLATES[family], without_marks(TEMPLATES[family]))
    )
    text, expected, has_marks = assistant_spans(marked, messages, TODAY)
    same, found, has_none = assistant_spans(plain, messages, TODAY)
    assert (text, has_marks, has_none) == (same, True, False)
    assert len(found) == len(expected) == sum(message["role"] == "assistant" for message in messages)
    for (start, end), (begin, stop) in zip(expected, found, strict=True):
        assert not text[min(start, begin) : max(start, begin)].strip()
        assert stop >= end and text[end:stop].replace("</s>", "").strip() == ""


@pytest.mark.parametrize("template", [TEMPLATES["smollm"], without_marks(TEMPLATES["smollm"])])
def test_a_conversation_that_the_assistant_opens_teaches_its_words_only(template):
    tokenizer = chat_tokenizer(EXACT, template)
    turns = [("assistant", "Welcome!"), ("user", "hi"), ("assistant", "yo")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ids, targets = encoded(row, tokenizer, format="messages")
    learned = tokenizer.decode([token for token, is_target in zip(ids, targets, strict=True) if is_target])
    assert learned.removesuffix("</s>") == "Welcome!<|im_end|>\nyo<|im_end|>\n"
    masked = tokenizer.decode([token for token, is_target in zip(ids, targets, strict=True) if not is_target])
    assert "helpful assistant" in masked and masked.count("<|im_start|>") == 4


def test_tokens_across_the_borders_of_turns_are_learned():
    """As transformers' mask has it: the space at the end of the generation prompt is one token with the first word."""
    tokenizer = chat_tokenizer(EXACT, TEMPLATES["words"])
    turns = [("user", "good or bad?"), ("assistant", "good"), ("user", "and now?"), ("assistant", "bad")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    ids, targets = encoded(row, tokenizer, format="messages")
    spans = "".join(
        "|" if not is_target else tokenizer.decode([token]) for token, is_target in zip(ids, targets, strict=True)
    )
    assert [part for part in spans.split("|") if part] == [" good", " bad"]
    prompt, reference = prompt_and_reference(row, DataConfig(format="messages"), tokenizer)
    assert prompt.text.endswith("and now?\nASSISTANT: ") and reference == "bad"
    before = ids[: max(i for i, is_target in enumerate(targets) if is_target and not targets[i - 1])]
    assert prompt_tokens(prompt, DataConfig(format="messages"), tokenizer) == (before, " ")
    assert tokenizer.decode(before).endswith("ASSISTANT:")


def test_a_template_that_rewrites_earlier_turns_is_refused():
    """As those of reasoning models, which take the thoughts out of all turns but the last."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('THINK')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "wellTHINKb"), ("user", "c"), ("assistant", "soTHINKd")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with refused("row 0", "changes earlier turns", "single-turn"):
        encoded(row, chat_tokenizer(EXACT, template), format="messages")
    ids, targets = encoded({"messages": row["messages"][:2]}, chat_tokenizer(EXACT, template), format="messages")
    learned = [token for token, is_target in zip(ids, targets, strict=True) if is_target]
    assert chat_tokenizer(EXACT, template).decode(learned) == "wellTHINKb<|im_end|>\n</s>"


# --- prompts and responses ------------------------------------------------------------------------------------------


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable bytes stand for themselves, the others for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def bytes_of(tokens: list[str], kind: str) -> list[bytes]:
    if kind == "sentencepiece":
        spelled = [
            bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
            for token in tokens
        ]
    else:
        spelled = [bytes(byte_alphabet()[letter] for letter in token) for token in tokens]
    if kind in ("sentencepiece", "byte-level, a space in front") and spelled and spelled[0].startswith(b" "):
        spelled[0] = spelled[0][1:]  # the tokenizer's own
    return spelled


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "metaspace"])  # it has no tokens for rare bytes
@thorough
@given(prompt=texts, response=texts, adds=st.sampled_from(["", "bos", "eos", "bos eos"]),
       template=st.sampled_from(["{prompt}", "{prompt}\n", "Q: {prompt} A: ", "[{prompt}]"]))  # fmt: skip
def test_targets_are_the_tokens_with_a_byte_of_the_response(kind, prompt, response, adds, template):
    if kind in (TRIMMED, "byte-level, a space in front") and (template.format(prompt=prompt) + response)[:1].isspace():
        return  # these take a first space for their own
    tokenizer = tokenizer_of_kind(kind, adds)
    keys = {"format": "prompt-response", "prompt_template": template}
    asked = template.format(prompt=prompt)
    if not asked and not response:
        return  # nothing to learn but EOS
    row = {"prompt": prompt, "response": response}
    ids, targets = encoded(row, tokenizer, **keys)
    bos = adds.startswith("bos")
    assert ids[-1] == tokenizer.eos_token_id and targets[-1]
    assert (ids[0] == tokenizer.bos_token_id) == bos
    body = ids[bos:-1]
    assert body == tokenizer(asked + response, add_special_tokens=False)["input_ids"]
    spelled = bytes_of(tokenizer.convert_ids_to_tokens(body), kind)
    assert b"".join(spelled) == (asked + response).encode()
    ends = accumulate(map(len, spelled))
    expected = [end > len(asked.encode()) for end in ends]
    if spelled and not spelled[0]:  # the tokenizer's own space: of no byte, and predicted from nothing
        expected[0] = targets[bos]
    assert targets == [False] * bos + expected + [True]
    # An answer is generated from the very tokens that come before the first target.
    data = DataConfig(**keys)
    question, reference = prompt_and_reference(row, data, tokenizer)
    first = targets.index(True)
    assert reference == response
    assert encode_prompt(question, data, tokenizer, 10_000) == (ids[:first] or [tokenizer.eos_token_id])
    begun = b"".join(spelled[: first - bos]).decode()
    assert begun + prompt_tokens(question, data, tokenizer)[1] == asked


@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_eos_of_the_user_stays_and_the_tokenizer_s_own_goes(kind, adds):
    tokenizer = tokenizer_of_kind(kind, adds)
    eos, keys = tokenizer.eos_token_id, {"format": "prompt-response", "prompt_template": "{prompt}</s>"}
    for response, learned in (("a", "a</s>"), ("", "</s>"), ("a</s>", "a</s>"), ("</s>", "</s>")):
        ids, targets = encoded({"prompt": "q", "response": response}, tokenizer, **keys)
        first = targets.index(True)
        assert ids[first - 1] == eos, "the template's"
        assert tokenizer.decode(ids[first:]).replace(" ", "") == learned
        assert ids.count(eos) == 1 + learned.count("</s>")
    for text, count in (("a", 1), ("a</s>", 1), ("a</s>b", 2)):
        ids, targets = encoded({"text": text}, tokenizer)
        assert ids.count(eos) == count and ids[-1] == eos and all(targets)


def test_a_space_before_a_text_is_none_before_a_response():
    """f7( + x): is f7(x):, whichever part of it a tokenizer that puts spaces in front is given."""
    for kind in ("sentencepiece", "metaspace"):
        tokenizer = tokenizer_of_kind(kind, "bos")
        row = {"prompt": "f7(", "response": "x):"}
        ids, targets = encoded(row, tokenizer, format="prompt-response", prompt_template="{prompt}")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "f7(x):"
        learned = tokenizer.decode([token for token, is_target in zip(ids, targets, strict=True) if is_target])
        assert learned.removeprefix("(") == "x):</s>", "or with the one token that is of both"


def test_a_tokenizer_without_offsets_is_refused_but_for_texts(tmp_path):
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "q": 1, "a": 2, "</s>": 3}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="</s>")
    assert not tokenizer.is_fast
    with refused("CTRLTokenizer", "data.format=text"):
        encoded({"prompt": "q", "response": "a"}, tokenizer, format="prompt-response")
    assert encoded({"text": "q a"}, tokenizer) == ([1, 2, 3], [True] * 3)


# --- the clock ------------------------------------------------------------------------------------------------------


def test_a_template_sees_the_day_of_the_settings_in_any_locale_and_time_zone(monkeypatch):
    import locale
    import time
    from datetime import datetime

    formats = "%d %b %Y|%-d %B %y|%A %a %j|%Y-%m-%d %H:%M:%S|%F %p %e|%d/%m"
    # A variable, not a literal: what the template hands over is known when it runs.
    template = (
        "{% set form = '" + formats + "' %}{% for m in messages %}{{ strftime_now(form) }}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": "!"}]
    for day in ("2024-07-26", "2031-01-05"):
        expected = datetime.fromisoformat(day).strftime(formats)
        for zone in ("Asia/Tokyo", "America/Los_Angeles"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert assistant_spans(chat_tokenizer(EXACT, template), messages, day)[0] == expected + "!"
    monkeypatch.undo()
    time.tzset()
    assert locale.getlocale(locale.LC_TIME)[0] in (None, "en_US"), "what `expected` was written in"
