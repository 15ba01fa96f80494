"""One line of a data set without a conversation: a prompt with its completion, or a text that is learnt whole.

The two are TRL's: {"prompt", "completion"}, each as text or each as messages, and {"text"}. Held to the same
strictness as a chat (chat_rows).
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

from catalog.datasets.chat import UNSUPPORTED, BadRow, Message, check_message, is_supervised, kind_of, quoted

COMPLETION_KEYS = ("prompt", "completion")
COMPLETION_FORM = '{"prompt": ..., "completion": ...}'
TEXT_FORM = '{"text": "..."}'
FORMS = "Give both as text, or both as lists of messages."


class Completion(TypedDict):
    """What is read, and what is learnt to follow it: both text, or both messages."""

    prompt: str | list[Message]
    completion: str | list[Message]


def check_completion(row: dict[str, Any]) -> Completion:
    """Raises BadRow."""
    _check_keys(row, COMPLETION_KEYS, form=COMPLETION_FORM)
    for key in COMPLETION_KEYS:
        if not isinstance(row[key], str | list):
            raise BadRow(f"{key}_not_text", f"{key} is {kind_of(row[key])}", FORMS)
    if type(row["prompt"]) is not type(row["completion"]):
        reason = f"prompt is {kind_of(row['prompt'])} and completion is {kind_of(row['completion'])}"
        raise BadRow("prompt_unlike_completion", reason, FORMS)
    if isinstance(row["completion"], list):
        _check_messages(row)
    elif not row["completion"].strip():
        raise BadRow("completion_empty", "the completion is empty", "Write what is to be learnt, or remove the row.")
    return cast(Completion, row)


def is_completion_supervised(row: Completion) -> bool:
    """Something in it is learnt."""
    completion = row["completion"]
    return isinstance(completion, str) or is_supervised(completion)


def as_chat(row: Completion) -> list[Message]:
    """The conversation of a row of messages: answers within the prompt are read, not learnt."""
    prompt, completion = cast(list[Message], row["prompt"]), cast(list[Message], row["completion"])
    masked = [Message({**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in prompt]
    return masked + completion


def check_text(row: dict[str, Any]) -> str:
    """Raises BadRow."""
    _check_keys(row, ("text",), form=TEXT_FORM)
    text = row["text"]
    if not isinstance(text, str):
        raise BadRow("text_not_text", f"text is {kind_of(text)}, not a string", f"Write {TEXT_FORM}.")
    if not text.strip():
        raise BadRow("text_empty", "the text is empty", "Write what is to be learnt, or remove the row.")
    return text


def _check_keys(row: dict[str, Any], keys: tuple[str, ...], *, form: str) -> None:
    for key in row:
        if key in UNSUPPORTED:
            raise BadRow("tools_unsupported", f"{key!r} is not supported", "Train on text alone: remove it.")
        if key not in keys:
            raise BadRow("unknown_key", f"the key {quoted(key)} is unknown", f"Write {form}, and nothing else.")
    for key in keys:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Write {form}.")


def _check_messages(row: dict[str, Any]) -> None:
    for key in COMPLETION_KEYS:
        messages = cast(list[Any], row[key])
        if not messages:
            remedy = "Write a list of {role, content} objects."
            raise BadRow("messages_empty", f"{key} is an empty list", remedy)
        for index, message in enumerate(messages):
            check_message(f"{key}[{index}]", message)
    answers = cast(list[Message], row["completion"])
    if not any(m["role"] == "assistant" and m["content"].strip() for m in answers):
        reason = "the completion has no assistant message with text"
        raise BadRow("no_assistant_turn", reason, "Add the answer that the model is to learn, or remove the row.")
