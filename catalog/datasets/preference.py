"""One line of a preference data set, in OpenAI's form: a prompt, the better answer to it and the worse one.

Held to the same strictness as a chat (chat_rows). The answers are what is compared, so each is one message with
text, and they differ.
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

from catalog.datasets.chat import BadRow, Message, check_message, kind_of, quoted

OUTPUTS = ("preferred_output", "non_preferred_output")
ROW_KEYS = ("input", *OUTPUTS)
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
PAIR_FORM = '{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}'
ONE_ANSWER = 'Write [{"role": "assistant", "content": "..."}].'
NO_TOOLS = "Train on text alone: remove it, or leave the list empty."


class PreferencePair(TypedDict):
    """Two answers to one prompt."""

    prompt: list[Message]
    preferred: Message
    rejected: Message


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


def _check_input(given: Any) -> list[Message]:
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
    messages = _check_messages("input.messages", fields["messages"], empty="Write the prompt that the answers are to.")
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


def _check_output(key: str, given: Any) -> Message:
    messages = _check_messages(key, given, empty=ONE_ANSWER)
    if len(messages) > 1:
        remedy = "Put earlier turns into input.messages: an answer is the one assistant message that follows them."
        raise BadRow("several_answers", f"{key} has {len(messages)} messages, not one", remedy)
    (answer,) = messages
    if answer["role"] != "assistant":
        raise BadRow("answer_not_assistant", f"{key}[0].role is {quoted(answer['role'])}", ONE_ANSWER)
    if not answer["content"].strip():
        remedy = "Write the answer, or remove the row."
        raise BadRow("answer_empty", f"{key}[0].content is empty", remedy)
    return answer


def _check_messages(place: str, given: Any, *, empty: str) -> list[Message]:
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
    return cast(list[Message], messages)
