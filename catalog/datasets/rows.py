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
FORMS = "Use a string for both prompt and completion, or a list of messages for both."
ONE_ANSWER = 'Use [{"role": "assistant", "content": "..."}].'
PROMPT_MESSAGES = f"Use a list of one or more messages, such as [{MESSAGE_FORM}]."


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
            raise BadRow(f"{key}_not_text", f"{key} is {kind_of(row[key])}, not a string or a list", FORMS)
    if type(row["prompt"]) is not type(row["completion"]):
        reason = f"prompt is {kind_of(row['prompt'])} but completion is {kind_of(row['completion'])}"
        raise BadRow("prompt_unlike_completion", reason, FORMS)
    if isinstance(row["completion"], list):
        return _checked_messages(row)
    if (unread := next((key for key in row if key in TOOL_KEYS), None)) is not None:
        reason = f"'{unread}' is allowed only with lists of messages, but prompt and completion are strings"
        remedy = "Remove the key, or use a list of messages for both prompt and completion."
        raise BadRow("unknown_key", reason, remedy)
    if not row["completion"].strip():
        raise BadRow("completion_empty", "completion is blank", "Add the text to train on, or remove the row.")
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
        raise BadRow("text_not_text", f"text is {kind_of(text)}, not a string", f"Use {TEXT_FORM}.")
    if not text.strip():
        raise BadRow("text_empty", "text is blank", "Add the text to train on, or remove the row.")
    return text


def _check_keys(row: dict[str, Any], keys: tuple[str, ...], *, form: str, optional: tuple[str, ...] = ()) -> None:
    for key in row:
        if key not in keys and key not in optional:
            raise _unknown_key(key, form)
    for key in keys:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Use {form}.")


def _unknown_key(key: str, form: str) -> BadRow:
    remedy = f"Remove the key, or correct its spelling. Use {form}."
    return BadRow("unknown_key", f"the row has an unknown key, {quoted(key)}", remedy)


def _checked_messages(row: dict[str, Any]) -> Completion:
    tools = checked_tools("", row)
    prompt = _some_messages("prompt", row["prompt"], remedy=PROMPT_MESSAGES)
    completion = _some_messages("completion", row["completion"], remedy=ONE_ANSWER)
    if not any(is_answer(message) for message in completion):
        reason = "completion has no assistant message with text or tool calls"
        raise BadRow("no_assistant_turn", reason, "Add the assistant message to train on, or remove the row.")
    return Completion(prompt=prompt, completion=completion, tools=tools)


def _some_messages(place: str, given: Any, *, remedy: str) -> list[ChatMessage]:
    """Return one or more messages. remedy: how to write them in this place. Raises BadRow."""
    messages = check_messages(place, given, remedy=remedy)
    if not messages:
        raise BadRow("messages_empty", f"{place} is an empty list", remedy)
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
            reason = f"'{key}' is in the row itself instead of in 'input'"
            raise BadRow("unknown_key", reason, f"Move '{key}' into 'input', next to 'messages'.")
        if key not in ROW_KEYS:
            raise _unknown_key(key, PAIR_FORM)
    for key in ROW_KEYS:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Use {PAIR_FORM}.")
    prompt = _check_input(row["input"])
    preferred, rejected = (_check_output(key, row[key]) for key in OUTPUTS)
    if all(preferred.get(key) == rejected.get(key) for key in ("content", "tool_calls")):
        remedy = "Make the answers different, or remove the row."
        raise BadRow("equal_outputs", "preferred_output and non_preferred_output are identical", remedy)
    return PreferencePair(prompt=prompt, preferred=preferred, rejected=rejected)


def _check_input(given: Any) -> Chat:
    if not isinstance(given, dict):
        raise BadRow(
            "input_not_object", f"input is {kind_of(given)}, not an object", 'Use "input": {"messages": [...]}.'
        )
    fields = cast(dict[str, Any], given)
    for key in fields:
        if key not in INPUT_KEYS:
            reason = f"input has an unknown key, {quoted(key)}"
            remedy = f"Remove the key, or correct its spelling. input can have these keys: {', '.join(INPUT_KEYS)}."
            raise BadRow("unknown_key", reason, remedy)
    tools = checked_tools("input.", fields)
    if "messages" not in fields:
        raise BadRow("messages_missing", 'input has no key "messages"', 'Use "input": {"messages": [...]}.')
    messages = _check_pair_messages("input.messages", fields["messages"], remedy=PROMPT_MESSAGES)
    if messages[-1]["role"] == "assistant":
        remedy = (
            "End input.messages with the message to answer, usually the user's. Put the answers only into "
            "preferred_output and non_preferred_output."
        )
        raise BadRow("prompt_ends_with_answer", "input.messages ends with an assistant message", remedy)
    return Chat(messages, tools)


def _check_output(key: str, given: Any) -> ChatMessage:
    messages = _check_pair_messages(key, given, remedy=ONE_ANSWER)
    if len(messages) > 1:
        remedy = (
            "Keep only the assistant message to compare. Messages that precede both answers belong in input.messages."
        )
        raise BadRow("several_answers", f"{key} has {len(messages)} messages, but must have exactly one", remedy)
    (answer,) = messages
    if answer["role"] != "assistant":
        reason = f"{key}[0].role is {quoted(answer['role'])}, not 'assistant'"
        raise BadRow("answer_not_assistant", reason, ONE_ANSWER)
    if not is_answer(answer):
        remedy = "Add the answer, or remove the row."
        raise BadRow("answer_empty", f"{key}[0].content is blank", remedy)
    return answer


def _check_pair_messages(place: str, given: Any, *, remedy: str) -> list[ChatMessage]:
    """Validate messages. remedy: how to write them in this place. Raises BadRow."""
    messages = _some_messages(place, given, remedy=remedy)
    for index, message in enumerate(messages):
        if "weight" in message:
            reason = f"{place}[{index}].weight is not allowed in a preference pair"
            raise BadRow("invalid_weight", reason, "Remove 'weight': only the two answers are trained on.")
    return messages


LABEL = "label"
UNPAIRED_FORM = '{"prompt": ..., "completion": ..., "label": true}'
LABEL_REMEDY = f"Use true for a desirable answer or false for an undesirable one: {UNPAIRED_FORM}."


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
        raise BadRow("label_missing", 'the key "label" is missing', LABEL_REMEDY)
    if not isinstance(row[LABEL], bool):
        raise BadRow("label_not_boolean", f"label is {kind_of(row[LABEL])}, not true or false", LABEL_REMEDY)
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
        remedy = (
            "Keep only the labeled assistant message. Move the others to prompt, which must not end with an answer."
        )
        raise BadRow("several_answers", f"completion has {len(answer)} messages, but must have exactly one", remedy)
    if answer[0]["role"] != "assistant":
        reason = f"completion[0].role is {quoted(answer[0]['role'])}, not 'assistant'"
        raise BadRow("answer_not_assistant", reason, ONE_ANSWER)
    if prompt[-1]["role"] == "assistant":
        remedy = (
            "End prompt with the message to answer, usually the user's. Put only the labeled answer into completion."
        )
        raise BadRow("prompt_ends_with_answer", "prompt ends with an assistant message", remedy)
    for key, messages in zip(COMPLETION_KEYS, (prompt, answer), strict=True):
        for index, message in enumerate(messages):
            if "weight" in message:
                reason = f"{key}[{index}].weight is not allowed in a labeled row"
                raise BadRow("invalid_weight", reason, "Remove 'weight': only the labeled answer is trained on.")
