"""One line of a data set without a conversation: a prompt with its completion, or a text that is learnt whole.

The two are TRL's: {"prompt", "completion"}, each as text or each as messages, and {"text"}. Held to the same
strictness as a chat (chat_rows).
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

from catalog.datasets.chat import UNSUPPORTED, BadRow, ChatMessage, check_message, is_supervised, kind_of, quoted

COMPLETION_KEYS = ("prompt", "completion")
COMPLETION_FORM = '{"prompt": ..., "completion": ...}'
TEXT_FORM = '{"text": "..."}'
FORMS = "Give both as text, or both as lists of messages."


class Completion(TypedDict):
    """What is read, and what is learnt to follow it: both text, or both messages."""

    prompt: str | list[ChatMessage]
    completion: str | list[ChatMessage]


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
        _check_completion_messages(row)
    elif not row["completion"].strip():
        raise BadRow("completion_empty", "the completion is empty", "Write what is to be learnt, or remove the row.")
    return cast(Completion, row)


def is_completion_supervised(row: Completion) -> bool:
    """Something in it is learnt."""
    completion = row["completion"]
    return isinstance(completion, str) or is_supervised(completion)


def as_chat(row: Completion) -> list[ChatMessage]:
    """The conversation of a row of messages: answers within the prompt are read, not learnt."""
    prompt, completion = cast(list[ChatMessage], row["prompt"]), cast(list[ChatMessage], row["completion"])
    masked = [ChatMessage({**turn, "weight": 0}) if turn["role"] == "assistant" else turn for turn in prompt]
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


def _check_completion_messages(row: dict[str, Any]) -> None:
    for key in COMPLETION_KEYS:
        messages = cast(list[Any], row[key])
        if not messages:
            remedy = "Write a list of {role, content} objects."
            raise BadRow("messages_empty", f"{key} is an empty list", remedy)
        for index, message in enumerate(messages):
            check_message(f"{key}[{index}]", message)
    answers = cast(list[ChatMessage], row["completion"])
    if not any(m["role"] == "assistant" and m["content"].strip() for m in answers):
        reason = "the completion has no assistant message with text"
        raise BadRow("no_assistant_turn", reason, "Add the answer that the model is to learn, or remove the row.")


OUTPUTS = ("preferred_output", "non_preferred_output")
ROW_KEYS = ("input", *OUTPUTS)
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
PAIR_FORM = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
ONE_ANSWER_PER_OUTPUT = 'Write [{"role": "assistant", "content": "..."}].'
NO_TOOLS = "Train on text alone: remove it, or leave the list empty."


class PreferencePair(TypedDict):
    """Two answers to one prompt."""

    prompt: list[ChatMessage]
    preferred: ChatMessage
    rejected: ChatMessage


def check_pair(row: dict[str, Any]) -> PreferencePair:
    """Raises BadRow."""
    for key in row:
        if key not in ROW_KEYS:
            raise BadRow("unknown_key", f"the key {quoted(key)} is unknown", f"Write {PAIR_FORM}.")
    for key in ROW_KEYS:
        if key not in row:
            raise BadRow(f"{key}_missing", f'the key "{key}" is missing', f"Write {PAIR_FORM}.")
    prompt = _check_input(row["input"])
    preferred, rejected = (_check_output(key, row[key]) for key in OUTPUTS)
    if preferred["content"] == rejected["content"]:
        remedy = "Remove the row: where both answers are the same, there is nothing to prefer."
        raise BadRow("equal_outputs", "preferred_output and non_preferred_output are the same", remedy)
    return PreferencePair(prompt=prompt, preferred=preferred, rejected=rejected)


def _check_input(given: Any) -> list[ChatMessage]:
    if not isinstance(given, dict):
        raise BadRow("input_not_object", f"input is {kind_of(given)}, not an object", 'Write {"messages": [...]}.')
    fields = cast(dict[str, Any], given)
    for key in fields:
        if key not in INPUT_KEYS:
            remedy = f"An input has the keys {', '.join(INPUT_KEYS)}."
            raise BadRow("unknown_key", f"input has the unknown key {quoted(key)}", remedy)
    _check_tools(fields)
    if "messages" not in fields:
        raise BadRow("messages_missing", 'input lacks the key "messages"', 'Write {"messages": [...]}.')
    messages = _check_pair_messages(
        "input.messages", fields["messages"], empty="Write the prompt that the answers are to."
    )
    if messages[-1]["role"] == "assistant":
        remedy = "An answer belongs in preferred_output or non_preferred_output; end the input with what is asked."
        raise BadRow("prompt_ends_with_answer", "input.messages ends with an assistant message", remedy)
    return messages


def _check_tools(fields: dict[str, Any]) -> None:
    """An empty list, as OpenAI's own example has it, asks for nothing; so does what goes with it."""
    tools = fields.get("tools")
    if tools is not None and tools != []:
        raise BadRow("tools_unsupported", "input.tools is not supported", NO_TOOLS)
    parallel = fields.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        reason = f"input.parallel_tool_calls is {kind_of(parallel)}"
        raise BadRow("invalid_parallel_tool_calls", reason, "Give true or false, or leave it out.")


def _check_output(key: str, given: Any) -> ChatMessage:
    messages = _check_pair_messages(key, given, empty=ONE_ANSWER_PER_OUTPUT)
    if len(messages) > 1:
        remedy = "Put earlier turns into input.messages: an answer is the one assistant message that follows them."
        raise BadRow("several_answers", f"{key} has {len(messages)} messages, not one", remedy)
    (answer,) = messages
    if answer["role"] != "assistant":
        raise BadRow("answer_not_assistant", f"{key}[0].role is {quoted(answer['role'])}", ONE_ANSWER_PER_OUTPUT)
    if not answer["content"].strip():
        remedy = "Write the answer, or remove the row."
        raise BadRow("answer_empty", f"{key}[0].content is empty", remedy)
    return answer


def _check_pair_messages(place: str, given: Any, *, empty: str) -> list[ChatMessage]:
    if not isinstance(given, list):
        reason = f"{place} is {kind_of(given)}, not a list"
        raise BadRow("messages_not_list", reason, "Write a list of {role, content} objects.")
    messages = cast(list[Any], given)
    if not messages:
        raise BadRow("messages_empty", f"{place} is an empty list", empty)
    for index, message in enumerate(messages):
        check_message(f"{place}[{index}]", message)
        if "weight" in message:
            remedy = "Leave it out: of a pair, the two answers are learnt and nothing else."
            raise BadRow("invalid_weight", f"{place}[{index}].weight stands in a pair", remedy)
    return cast(list[ChatMessage], messages)


LABEL = "label"
UNPAIRED_FORM = '{"prompt": ..., "completion": ..., "label": true}'
LABEL_REMEDY = f"Write true for a desirable answer and false for another: {UNPAIRED_FORM}."
ONE_ANSWER = 'Write [{"role": "assistant", "content": "..."}].'


class LabeledAnswer(TypedDict):
    """One answer to one prompt, and what was said of it."""

    answer: Completion
    is_desirable: bool


def check_unpaired(row: dict[str, Any]) -> LabeledAnswer:
    """Raises BadRow."""
    for key in row:
        if key != LABEL and key not in COMPLETION_KEYS:
            raise BadRow("unknown_key", f"the key {quoted(key)} is unknown", f"Write {UNPAIRED_FORM}.")
    if LABEL not in row:
        raise BadRow("label_missing", 'the key "label" is missing', LABEL_REMEDY)
    if not isinstance(row[LABEL], bool):
        raise BadRow("label_not_boolean", f"label is {kind_of(row[LABEL])}, not true or false", LABEL_REMEDY)
    answer = check_completion({key: value for key, value in row.items() if key != LABEL})
    if isinstance(answer["completion"], list):
        _check_turns(cast(list[ChatMessage], answer["prompt"]), answer["completion"])
    return LabeledAnswer(answer=answer, is_desirable=row[LABEL])


def turns_of(answer: Completion) -> list[ChatMessage] | None:
    """The conversation that ends with the answer; None where both are text."""
    if isinstance(answer["completion"], str):
        return None
    return [*cast(list[ChatMessage], answer["prompt"]), *answer["completion"]]


def _check_turns(prompt: list[ChatMessage], answer: list[ChatMessage]) -> None:
    if len(answer) > 1:
        remedy = "Put earlier turns into the prompt: the answer is the one assistant message that follows them."
        raise BadRow("several_answers", f"the completion has {len(answer)} messages, not one", remedy)
    if answer[0]["role"] != "assistant":
        raise BadRow("answer_not_assistant", f"completion[0].role is {quoted(answer[0]['role'])}", ONE_ANSWER)
    if prompt[-1]["role"] == "assistant":
        remedy = "An answer belongs in the completion; end the prompt with what is asked."
        raise BadRow("prompt_ends_with_answer", "the prompt ends with an assistant message", remedy)
    if any("weight" in message for message in (*prompt, *answer)):
        remedy = "Leave it out: the labeled answer is learnt and nothing else."
        raise BadRow("invalid_weight", "a message of a labeled answer has a weight", remedy)
