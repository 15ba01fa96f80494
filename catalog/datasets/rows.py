"""Validates rows other than chats: prompts with completions, plain text, preference pairs and labeled answers.

Completions and texts have TRL's formats: {"prompt", "completion"}, both as text or both as messages, and {"text"}. The
checks are as strict as those of chats.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from catalog.datasets.chat import TOOL_KEYS, Chat, checked_tools, is_supervised
from catalog.datasets.messages import MESSAGE_FORM, ChatMessage, check_messages, is_answer
from catalog.datasets.row_json import BadRow, kind_of, quoted

COMPLETION_KEYS = ("prompt", "completion")
COMPLETION_FORM = '{"prompt": ..., "completion": ...}'
TEXT_FORM = '{"text": "..."}'
ONE_ANSWER = '[{"role": "assistant", "content": "..."}]'
PROMPT_MESSAGES = f"a list of one or more messages, such as [{MESSAGE_FORM}]"


class Completion(TypedDict):
    """A prompt, and the completion to train on: both text, or both messages."""

    prompt: str | list[ChatMessage]
    completion: str | list[ChatMessage]
    tools: NotRequired[list[dict[str, Any]] | None]
    """Only with messages."""


def check_completion(row: dict[str, Any], *, form: str = COMPLETION_FORM) -> Completion:
    """Validate a prompt with its completion. form: how to write the whole row. Raises BadRow."""
    _check_keys(row, COMPLETION_KEYS, form=form, optional=TOOL_KEYS)
    for key in COMPLETION_KEYS:
        if not isinstance(row[key], str | list):
            raise BadRow("field_not_text", key=key, kind=kind_of(row[key]))
    if type(row["prompt"]) is not type(row["completion"]):
        raise BadRow("prompt_unlike_completion", prompt=kind_of(row["prompt"]), completion=kind_of(row["completion"]))
    if isinstance(row["completion"], list):
        return _checked_messages(row)
    if (unread := next((key for key in row if key in TOOL_KEYS), None)) is not None:
        raise BadRow("tools_with_text", unread=unread)
    if not row["completion"].strip():
        raise BadRow("completion_empty")
    return cast(Completion, row)


def is_completion_supervised(row: Completion) -> bool:
    """Return whether the row has tokens to train on."""
    completion = row["completion"]
    return isinstance(completion, str) or is_supervised(Chat(completion))


def as_chat(row: Completion) -> Chat:
    """Return the conversation of a row of messages. Answers within the prompt get weight 0."""
    prompt, completion = cast(list[ChatMessage], row["prompt"]), cast(list[ChatMessage], row["completion"])
    masked = [ChatMessage({**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in prompt]
    return Chat(masked + completion, row.get("tools"))


def check_text(row: dict[str, Any]) -> str:
    """Validate a row of plain text. Raises BadRow."""
    _check_keys(row, ("text",), form=TEXT_FORM)
    text = row["text"]
    if not isinstance(text, str):
        raise BadRow("text_not_text", kind=kind_of(text))
    if not text.strip():
        raise BadRow("text_empty")
    return text


def _check_keys(row: dict[str, Any], keys: tuple[str, ...], *, form: str, optional: tuple[str, ...] = ()) -> None:
    for key in row:
        if key not in keys and key not in optional:
            raise _unknown_key(key, form)
    for key in keys:
        if key not in row:
            raise BadRow("key_missing", key=key, form=form)


def _unknown_key(key: str, form: str) -> BadRow:
    return BadRow("unknown_row_key", key=quoted(key), form=form)


def _checked_messages(row: dict[str, Any]) -> Completion:
    tools = checked_tools("", row)
    prompt = _some_messages("prompt", row["prompt"], form=PROMPT_MESSAGES)
    completion = _some_messages("completion", row["completion"], form=ONE_ANSWER)
    if not any(is_answer(message) for message in completion):
        raise BadRow("completion_without_answer")
    return Completion(prompt=prompt, completion=completion, tools=tools)


def _some_messages(place: str, given: Any, *, form: str) -> list[ChatMessage]:
    """Return one or more messages. form: how to write them in this place. Raises BadRow."""
    messages = check_messages(place, given, form=form)
    if not messages:
        raise BadRow("messages_empty", place=place, form=form)
    return messages


OUTPUTS = ("preferred_output", "non_preferred_output")
ROW_KEYS = ("input", *OUTPUTS)
INPUT_KEYS = ("messages", *TOOL_KEYS)
PAIR_FORM = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'


class PreferencePair(TypedDict):
    """Two answers to one prompt."""

    prompt: Chat
    preferred: ChatMessage
    rejected: ChatMessage


def check_pair(row: dict[str, Any]) -> PreferencePair:
    """Validate a pair of answers. Raises BadRow."""
    for key in row:
        if key in TOOL_KEYS:
            raise BadRow("tools_outside_input", key=key)
        if key not in ROW_KEYS:
            raise _unknown_key(key, PAIR_FORM)
    for key in ROW_KEYS:
        if key not in row:
            raise BadRow("key_missing", key=key, form=PAIR_FORM)
    prompt = _check_input(row["input"])
    preferred, rejected = (_check_output(key, row[key]) for key in OUTPUTS)
    if all(preferred.get(key) == rejected.get(key) for key in ("content", "tool_calls")):
        raise BadRow("equal_outputs")
    return PreferencePair(prompt=prompt, preferred=preferred, rejected=rejected)


def _check_input(given: Any) -> Chat:
    if not isinstance(given, dict):
        raise BadRow("input_not_object", kind=kind_of(given))
    fields = cast(dict[str, Any], given)
    for key in fields:
        if key not in INPUT_KEYS:
            raise BadRow("unknown_input_key", key=quoted(key), input_keys=", ".join(INPUT_KEYS))
    tools = checked_tools("input.", fields)
    if "messages" not in fields:
        raise BadRow("input_messages_missing")
    messages = _check_pair_messages("input.messages", fields["messages"], form=PROMPT_MESSAGES)
    if messages[-1]["role"] == "assistant":
        raise BadRow("input_ends_with_answer")
    return Chat(messages, tools)


def _check_output(key: str, given: Any) -> ChatMessage:
    messages = _check_pair_messages(key, given, form=ONE_ANSWER)
    if len(messages) > 1:
        raise BadRow("several_answers", key=key, num_messages=len(messages))
    (answer,) = messages
    if answer["role"] != "assistant":
        raise BadRow("preference_answer_not_assistant", key=key, role=quoted(answer["role"]))
    if not is_answer(answer):
        raise BadRow("answer_empty", key=key)
    return answer


def _check_pair_messages(place: str, given: Any, *, form: str) -> list[ChatMessage]:
    """Validate messages. form: how to write them in this place. Raises BadRow."""
    messages = _some_messages(place, given, form=form)
    for index, message in enumerate(messages):
        if "weight" in message:
            raise BadRow("weight_in_preference_pair", place=place, index=index)
    return messages


LABEL = "label"
UNPAIRED_FORM = '{"prompt": ..., "completion": ..., "label": true}'


class LabeledAnswer(TypedDict):
    """One answer to one prompt, and its label."""

    answer: Completion
    is_desirable: bool


def check_unpaired(row: dict[str, Any]) -> LabeledAnswer:
    """Validate an answer with a label. Raises BadRow."""
    for key in row:
        if key != LABEL and key not in (*COMPLETION_KEYS, *TOOL_KEYS):
            raise _unknown_key(key, UNPAIRED_FORM)
    if LABEL not in row:
        raise BadRow("label_missing")
    if not isinstance(row[LABEL], bool):
        raise BadRow("label_not_boolean", kind=kind_of(row[LABEL]))
    answer = check_completion({key: value for key, value in row.items() if key != LABEL}, form=UNPAIRED_FORM)
    if isinstance(answer["completion"], list):
        _check_turns(cast(list[ChatMessage], answer["prompt"]), answer["completion"])
    return LabeledAnswer(answer=answer, is_desirable=row[LABEL])


def conversation_of(answer: Completion) -> Chat | None:
    """Return the conversation that ends with the answer; None if prompt and answer are text."""
    if isinstance(answer["completion"], str):
        return None
    return Chat([*cast(list[ChatMessage], answer["prompt"]), *answer["completion"]], answer.get("tools"))


def _check_turns(prompt: list[ChatMessage], answer: list[ChatMessage]) -> None:
    if len(answer) > 1:
        raise BadRow("several_labeled_answers", num_answer=len(answer))
    if answer[0]["role"] != "assistant":
        raise BadRow("labeled_answer_not_assistant", role=quoted(answer[0]["role"]))
    if prompt[-1]["role"] == "assistant":
        raise BadRow("prompt_ends_with_answer")
    for key, messages in zip(COMPLETION_KEYS, (prompt, answer), strict=True):
        for index, message in enumerate(messages):
            if "weight" in message:
                raise BadRow("weight_in_labeled_row", key=key, index=index)
