"""Conversations: rendered by the model's chat template, and which characters of the text the assistant writes.

A template that marks the assistant's words itself ({% generation %}) is taken at its word. Of any other one, its own
renderings show: the assistant writes what follows the generation prompt, up to the end of its turn.
"""

from __future__ import annotations

import datetime
import functools
import re
from typing import Any

from common.errors import UserError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
MONTHS: tuple[str, ...] = ("January", "February", "March", "April", "May", "June", "July")
MONTHS += ("August", "September", "October", "November", "December")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def assistant_spans(tokenizer, messages: list[dict[str, Any]], today: str) -> tuple[str, list[tuple[int, int]], bool]:
    """The text of a conversation up to the assistant's last turn, the spans [start, end) of it that the assistant
    writes, and whether the template marks them itself.

    `today` (YYYY-MM-DD) is the day that the template takes for today. Raises `UserError` if the template refuses the
    turns, or changes an earlier turn when a later one comes, so that its words cannot be found in the text.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: turns[-1] + 1]
    template = _template(tokenizer, today)
    if GENERATION_TAG.search(template):
        return *_render_with_marks(tokenizer, messages, template), True
    text = _render(tokenizer, messages, template)
    return text, [_span(tokenizer, messages, turn, text, template) for turn in turns], False


def _span(tokenizer, messages: list[dict], turn: int, text: str, template: str) -> tuple[int, int]:
    """The span of `text`, all of the conversation, that the assistant writes in `messages[turn]`."""
    so_far = text if turn == len(messages) - 1 else _render(tokenizer, messages[: turn + 1], template)
    start, end = _generation_prompt(tokenizer, messages[:turn], so_far, template), len(so_far)
    header = tail = ""
    if start is None or not text.startswith(so_far):
        header, tail = _frame(tokenizer, messages[: turn + 1], template)
    if start is None:
        start = len(header)
        if not so_far.startswith(header):
            raise _changes_turns()
    if not text.startswith(so_far):  # such as a template with EOS after the last turn only
        end = _end_of_word(tokenizer, text, _equal_until(so_far, text))
        if end < len(so_far) - len(tail):
            raise _changes_turns()
    return start, end


def _generation_prompt(tokenizer, earlier: list[dict], so_far: str, template: str) -> int | None:
    """The length of what a model is given to write the turn that `so_far` ends with; None if that cannot be known."""
    if not earlier:
        return None  # nobody asks a model to open a conversation
    try:
        prompt = _render(tokenizer, earlier, template, add_generation_prompt=True)
    except UserError:  # as of a system prompt alone
        return None
    return len(prompt) if so_far.startswith(prompt) else None


def _frame(tokenizer, messages: list[dict], template: str) -> tuple[str, str]:
    """What the template puts before and after the content of the last message: what does not change with it."""
    one, other = (_render(tokenizer, [*messages[:-1], {**messages[-1], "content": x}], template) for x in "AB")
    return one[: _equal_until(one, other)], one[len(one) - _equal_until(one[::-1], other[::-1]) :]


def _equal_until(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _end_of_word(tokenizer, text: str, end: int) -> int:
    """`end`, or where the added token begins that it would cut: <|end|> and <|user|> begin alike."""
    for word in tokenizer.get_added_vocab():
        if (start := text.find(word, max(0, end - len(word) + 1), end + len(word) - 1)) >= 0:
            end = min(end, start)
    return end


def _changes_turns() -> UserError:
    return UserError(
        "the chat template of model.name changes earlier turns when a new one comes, so that the assistant's tokens "
        "cannot be separated; use single-turn rows, or data.format=prompt-response"
    )


def _template(tokenizer, today: str) -> str:
    """The chat template, with `today` instead of the clock."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # it has several, and none is the default
        raise UserError(
            f"data.format=messages: the chat template of model.name: {str(error).splitlines()[0]}"
        ) from error
    return _clock(today) + template if "strftime_now" in template else template


@functools.cache
def _clock(today: str) -> str:
    """A macro that hides transformers' `strftime_now`: the same text on each day, in each time zone and language."""
    day = datetime.date.fromisoformat(today)
    month, weekday = MONTHS[day.month - 1], DAYS[day.weekday()]
    values = {
        **{"-d": f"{day.day}", "-m": f"{day.month}", "-y": f"{day.year % 100}", "-j": f"{day:%j}".lstrip("0")},
        **{"-H": "0", "-I": "12", "-M": "0", "-S": "0"},
        **{"d": f"{day.day:02}", "m": f"{day.month:02}", "Y": f"{day.year:04}", "y": f"{day.year % 100:02}"},
        **{"B": month, "b": month[:3], "h": month[:3], "A": weekday, "a": weekday[:3], "j": f"{day:%j}"},
        **{"H": "00", "I": "12", "M": "00", "S": "00", "f": "000000", "p": "AM", "Z": "UTC", "z": "+0000"},
        **{"w": f"{day.isoweekday() % 7}", "u": f"{day.isoweekday()}", "e": f"{day.day:2}"},
        **{"F": today, "T": "00:00:00", "R": "00:00", "X": "00:00:00", "D": f"{day:%m/%d/%y}", "x": f"{day:%m/%d/%y}"},
        **{"c": f"{weekday[:3]} {month[:3]} {day.day:2} 00:00:00 {day.year}"},
    }
    filters = "".join(f"|replace('%{directive}', '{value}')" for directive, value in values.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"


def _render(tokenizer, messages: list[dict], template: str, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of the model's author, and refuses as it likes
        raise _refused(messages, error) from error


def _render_with_marks(tokenizer, messages: list[dict], template: str) -> tuple[str, list[tuple[int, int]]]:
    # transformers has the spans in characters for itself, and gives them out in tokens only.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled, written, spans = _compile_jinja_template(template), [""], []
    values = {**tokenizer.special_tokens_map, "tools": None, "documents": None, "add_generation_prompt": False}
    try:
        with compiled.environment.activate_tracker(written, spans):
            for piece in compiled.generate(messages=messages, **values):
                written.append(piece)
    except Exception as error:
        raise _refused(messages, error) from error
    return "".join(written), spans


def _refused(messages: list[dict], error: Exception) -> UserError:
    roles = ", ".join(message["role"] for message in messages)
    return UserError(f"data.format=messages: the chat template of model.name refuses the turns {roles}: {error}")
