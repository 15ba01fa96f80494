"""Validation of rows other than chats: prompts with completions, plain text, preference pairs and labeled answers.

Completions and texts have TRL's formats: {"prompt", "completion"}, both as text or both as messages, and {"text"}. The
checks are as strict as those of chats.
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

from catalog.datasets.chat import (
    MESSAGE_FORM,
    UNSUPPORTED,
    BadRow,
    ChatMessage,
    check_message,
    is_supervised,
    kind_of,
    quoted,
)

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


def check_completion(row: dict[str, Any]) -> Completion:
    """Validate a prompt with its completion. Raises BadRow."""
    _check_keys(row, COMPLETION_KEYS, form=COMPLETION_FORM)
    for key in COMPLETION_KEYS:
        if not isinstance(row[key], str | list):
            raise BadRow(f"{key}_not_text", f"{key} is {kind_of(row[key])}, not a string or a list", FORMS)
    if type(row["prompt"]) is not type(row["completion"]):
        reason = f"prompt is {kind_of(row['prompt'])} but completion is {kind_of(row['completion'])}"
        raise BadRow("prompt_unlike_completion", reason, FORMS)
    if isinstance(row["completion"], list):
        _check_completion_messages(row)
    elif not row["completion"].strip():
        raise BadRow("completion_empty", "completion is blank", "Add the text to train on, or remove the row.")
    return cast(Completion, row)


def is_completion_supervised(row: Completion) -> bool:
    """Return whether the row has tokens to train on."""
    completion = row["completion"]
    return isinstance(completion, str) or is_supervised(completion)


def as_chat(row: Completion) -> list[ChatMessage]:
    """Return the conversation of a row of messages. Answers within the prompt get weight 0."""
    prompt, completion = cast(list[ChatMessage], row["prompt"]), cast(list[ChatMessage], row["completion"])
    masked = [ChatMessage({**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in prompt]
    return masked + completion


def check_text(row: dict[str, Any]) -> str:
    """Validate a row of plain text. Raises BadRow."""
    _check_keys(row, ("text",), form=TEXT_FORM)
    text = row["text"]
    if not isinstance(text, str):
        raise BadRow("text_not_text", f"text is {kind_of(text)}, not a string", f"Use {TEXT_FORM}.")
    if not text.strip():
        raise BadRow("text_empty", "text is blank", "Add the text to train on, or remove the row.")
    return text


def _check_keys(row: dict[str, Any], keys: tuple[str, ...], *, form: str) -> None:
    for key in row:
        if key in UNSUPPORTED:
            reason = f"the key {quoted(key)} is not supported"
            raise BadRow("tools_unsupported", reason, "Remove this key: only text is supported.")
        if key not in keys:
            raise _unknown_key(key, form)
    for key in keys:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Use {form}.")


def _unknown_key(key: str, form: str) -> BadRow:
    remedy = f"Remove the key, or correct its spelling. Use {form}."
    return BadRow("unknown_key", f"the row has an unknown key, {quoted(key)}", remedy)


def _check_completion_messages(row: dict[str, Any]) -> None:
    for key in COMPLETION_KEYS:
        messages = cast(list[Any], row[key])
        if not messages:
            remedy = PROMPT_MESSAGES if key == "prompt" else ONE_ANSWER
            raise BadRow("messages_empty", f"{key} is an empty list", remedy)
        for index, message in enumerate(messages):
            check_message(f"{key}[{index}]", message)
    answers = cast(list[ChatMessage], row["completion"])
    if not any(m["role"] == "assistant" and m["content"].strip() for m in answers):
        reason = "completion has no assistant message with text"
        raise BadRow("no_assistant_turn", reason, "Add the assistant message to train on, or remove the row.")


OUTPUTS = ("preferred_output", "non_preferred_output")
ROW_KEYS = ("input", *OUTPUTS)
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
PAIR_FORM = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
NO_TOOLS = "Remove input.tools: tools are not supported."


class PreferencePair(TypedDict):
    """Two answers to one prompt."""

    prompt: list[ChatMessage]
    preferred: ChatMessage
    rejected: ChatMessage


def check_pair(row: dict[str, Any]) -> PreferencePair:
    """Validate a pair of answers. Raises BadRow."""
    for key in row:
        if key not in ROW_KEYS:
            raise _unknown_key(key, PAIR_FORM)
    for key in ROW_KEYS:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Use {PAIR_FORM}.")
    prompt = _check_input(row["input"])
    preferred, rejected = (_check_output(key, row[key]) for key in OUTPUTS)
    if preferred["content"] == rejected["content"]:
        remedy = "Make the answers different, or remove the row."
        raise BadRow("equal_outputs", "preferred_output and non_preferred_output are identical", remedy)
    return PreferencePair(prompt=prompt, preferred=preferred, rejected=rejected)


def _check_input(given: Any) -> list[ChatMessage]:
    if not isinstance(given, dict):
        raise BadRow(
            "input_not_object", f"input is {kind_of(given)}, not an object", 'Use "input": {"messages": [...]}.'
        )
    fields = cast(dict[str, Any], given)
    for key in fields:
        if key not in INPUT_KEYS:
            reason = f"input has an unknown key, {quoted(key)}"
            remedy = 'Remove the key, or correct its spelling. "input" needs only "messages".'
            raise BadRow("unknown_key", reason, remedy)
    _check_tools(fields)
    if "messages" not in fields:
        raise BadRow("messages_missing", 'input has no key "messages"', 'Use "input": {"messages": [...]}.')
    messages = _check_pair_messages("input.messages", fields["messages"], remedy=PROMPT_MESSAGES)
    if messages[-1]["role"] == "assistant":
        remedy = (
            "End input.messages with the message to answer, usually the user's. Put the answers only into "
            "preferred_output and non_preferred_output."
        )
        raise BadRow("prompt_ends_with_answer", "input.messages ends with an assistant message", remedy)
    return messages


def _check_tools(fields: dict[str, Any]) -> None:
    """Reject tools. An empty list, as in OpenAI's own example, and `parallel_tool_calls` are accepted and ignored."""
    tools = fields.get("tools")
    if tools is not None and tools != []:
        raise BadRow("tools_unsupported", "input.tools is not supported", NO_TOOLS)
    parallel = fields.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        reason = f"input.parallel_tool_calls is {kind_of(parallel)}, not true or false"
        raise BadRow(
            "invalid_parallel_tool_calls", reason, "Remove input.parallel_tool_calls: tools are not supported."
        )


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
    if not answer["content"].strip():
        remedy = "Add the answer, or remove the row."
        raise BadRow("answer_empty", f"{key}[0].content is blank", remedy)
    return answer


def _check_pair_messages(place: str, given: Any, *, remedy: str) -> list[ChatMessage]:
    """Validate messages. remedy: how to write them in this place. Raises BadRow."""
    if not isinstance(given, list):
        raise BadRow("messages_not_list", f"{place} is {kind_of(given)}, not a list", remedy)
    messages = cast(list[Any], given)
    if not messages:
        raise BadRow("messages_empty", f"{place} is an empty list", remedy)
    for index, message in enumerate(messages):
        check_message(f"{place}[{index}]", message)
        if "weight" in message:
            reason = f"{place}[{index}].weight is not allowed in a preference pair"
            raise BadRow("invalid_weight", reason, "Remove 'weight': only the two answers are trained on.")
    return cast(list[ChatMessage], messages)


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
        if key != LABEL and key not in COMPLETION_KEYS:
            raise _unknown_key(key, UNPAIRED_FORM)
    if LABEL not in row:
        raise BadRow("label_missing", 'the key "label" is missing', LABEL_REMEDY)
    if not isinstance(row[LABEL], bool):
        raise BadRow("label_not_boolean", f"label is {kind_of(row[LABEL])}, not true or false", LABEL_REMEDY)
    answer = check_completion({key: value for key, value in row.items() if key != LABEL})
    if isinstance(answer["completion"], list):
        _check_turns(cast(list[ChatMessage], answer["prompt"]), answer["completion"])
    return LabeledAnswer(answer=answer, is_desirable=row[LABEL])


def turns_of(answer: Completion) -> list[ChatMessage] | None:
    """Return the conversation that ends with the answer; None if prompt and answer are text."""
    if isinstance(answer["completion"], str):
        return None
    return [*cast(list[ChatMessage], answer["prompt"]), *answer["completion"]]


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
