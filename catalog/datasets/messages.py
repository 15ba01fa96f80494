"""Validates the messages of a row, in OpenAI's format. Error messages never quote the content of a message."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from catalog.datasets.row_json import BadRow, kind_of, quoted
from catalog.datasets.tools import ToolCall, check_tool_calls, checked_call

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROLES_REMEDY = f"Use one of these roles: {', '.join(ROLES)}."
CALLS = ("tool_calls", "function_call")
"""`function_call` and the role `function` are OpenAI's deprecated format."""
MESSAGE_KEYS = frozenset({"role", "content", "weight", "name", "tool_call_id", *CALLS})
NOT_KEPT = frozenset({"annotations", "audio", "refusal", *CALLS})
"""Keys that are ignored without a value, as in a response that was saved completely."""
MESSAGE_FORM = '{"role": "user", "content": "..."}'
CHAT_FORM = f'[{MESSAGE_FORM}, {{"role": "assistant", "content": "..."}}]'
TEXT_PART = '{"type": "text", "text": "..."}'
PART_FORM = f"Use {TEXT_PART}."
TEXT_OR_PARTS = f"Use a string, or a list of one or more text parts: [{TEXT_PART}]."


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    content: str
    """Empty if an assistant message has only tool calls."""
    weight: NotRequired[int]
    """0: the model reads the message but does not train on it. Only for assistant messages."""
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    """Only for assistant messages."""


def check_messages(place: str, given: Any, *, remedy: str) -> list[ChatMessage]:
    """Return the messages in one form: content as text, and deprecated function calls as tool calls.

    remedy: how to write a list of messages in this place. Raises BadRow.
    """
    if not isinstance(given, list):
        raise BadRow("messages_not_list", f"{place} is {kind_of(given)}, not a list", remedy)
    messages = cast(list[Any], given)
    call_ids: set[str] = set()
    last_call_id: str | None = None
    for index, message in enumerate(messages):
        position = f"{place}[{index}]"
        _check_message(position, message)
        if "function_call" in message:
            function = checked_call(f"{position}.function_call", message.pop("function_call"))
            message["tool_calls"] = [ToolCall(id=f"call_{index}", type="function", function=function)]
        elif message["role"] == "function":
            _as_tool_message(position, message, last_call_id)
        elif "tool_call_id" in message and message["tool_call_id"] not in call_ids:
            reason = f"{position}.tool_call_id is {quoted(message['tool_call_id'])}, but no earlier call has this ID"
            raise BadRow("invalid_tool_call_id", reason, "Use the ID of the call that the message answers.")
        for call in cast(list[ToolCall], message.get("tool_calls", [])):
            last_call_id = call["id"]
            call_ids.add(call["id"])
    return cast(list[ChatMessage], messages)


def is_answer(message: ChatMessage) -> bool:
    """Return whether the message is an assistant's with text or tool calls."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _check_message(place: str, message: Any) -> None:
    """Validate a message, and join content that is given as parts of text. `place` is its name in errors."""
    if not isinstance(message, dict):
        reason = f"{place} is {kind_of(message)}, not an object"
        raise BadRow("message_not_object", reason, f"Use an object for each message, such as {MESSAGE_FORM}.")
    fields = cast(dict[str, Any], message)
    for key in NOT_KEPT & fields.keys():
        if fields[key] is None or (key == "annotations" and fields[key] == []):
            del fields[key]
    if not fields.keys() <= MESSAGE_KEYS:
        _refuse_key(place, next(key for key in fields if key not in MESSAGE_KEYS))
    if "role" not in fields:
        raise BadRow("invalid_role", f"{place}.role is missing", ROLES_REMEDY)
    role = fields["role"]
    if role not in ROLES:
        shown_role = quoted(role) if isinstance(role, str) else kind_of(role)
        raise BadRow("invalid_role", f"{place}.role is {shown_role}, which is not a valid role", ROLES_REMEDY)
    _check_calls(place, role, fields)
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(f"{place}.content", fields["content"])
    if fields.get("content") is None and any(key in fields for key in CALLS):
        fields["content"] = ""
    if not isinstance(fields.get("content"), str):
        given = f"{kind_of(fields['content'])}, not text" if "content" in fields else "missing"
        raise BadRow("content_not_text", f"{place}.content is {given}", TEXT_OR_PARTS)
    if len(fields) > 2:
        _check_extras(place, role, fields)


def _check_calls(place: str, role: str, fields: dict[str, Any]) -> None:
    for key in CALLS:
        if key in fields and role != "assistant":
            reason = f"{place}.{key} is allowed only on assistant messages, but the message's role is '{role}'"
            raise BadRow("invalid_tool_calls", reason, f"Remove '{key}' from this message.")
    if all(key in fields for key in CALLS):
        reason = f"{place} has both 'tool_calls' and 'function_call'"
        raise BadRow("invalid_tool_calls", reason, "Keep only 'tool_calls'. 'function_call' is its deprecated form.")
    if "tool_calls" in fields:
        fields["tool_calls"] = check_tool_calls(f"{place}.tool_calls", fields["tool_calls"])


def _as_tool_message(place: str, message: dict[str, Any], last_call_id: str | None) -> None:
    """Turn the result of a deprecated function call into a tool message. It answers the last call."""
    if last_call_id is None:
        given = place.partition("[")[0]
        reason = f"{place}.role is 'function', but no earlier message in '{given}' has a function call"
        remedy = f"Put the assistant message with 'function_call' before it in '{given}'."
        raise BadRow("invalid_tool_call_id", reason, remedy)
    message["role"], message["tool_call_id"] = "tool", last_call_id


def _joined(place: str, parts: list[Any]) -> str:
    """Join parts of text without a separator, as a chat template does. Raises BadRow."""
    if not parts:
        raise BadRow("content_not_text", f"{place} is an empty list", TEXT_OR_PARTS)
    for index, part in enumerate(parts):
        position = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise BadRow("content_not_text", f"{position} is {kind_of(part)}, not an object", PART_FORM)
        _check_part(position, cast(dict[str, Any], part))
    return "".join(part["text"] for part in parts)


def _check_part(position: str, part: dict[str, Any]) -> None:
    kind = part.get("type")
    if kind != "text":
        shown_type = quoted(kind) if isinstance(kind, str) else kind_of(kind)
        if "type" not in part:
            raise BadRow("content_not_text", f"{position}.type is missing", PART_FORM)
        remedy = f"Remove images, audio and files: only text is supported. For text, use {TEXT_PART}."
        raise BadRow("content_not_text", f"{position}.type is {shown_type}, not 'text'", remedy)
    if not isinstance(part.get("text"), str):
        given = f"{kind_of(part['text'])}, not a string" if "text" in part else "missing"
        raise BadRow("content_not_text", f"{position}.text is {given}", PART_FORM)
    if len(part) > 2:
        unknown = next(key for key in part if key not in ("type", "text"))
        remedy = f"Remove this key. {PART_FORM}"
        raise BadRow("content_not_text", f"{position} has an unknown key, {quoted(unknown)}", remedy)


def _refuse_key(place: str, key: str) -> None:
    if key in NOT_KEPT:
        remedy = "Remove this key, or use null: only text and tool calls are supported."
        raise BadRow("content_unsupported", f"{place}.{key} is not supported", remedy)
    allowed = ", ".join(sorted(MESSAGE_KEYS))
    remedy = f"Remove the key, or correct its spelling. A message can have these keys: {allowed}."
    raise BadRow("unknown_key", f"{place} has an unknown key, {quoted(key)}", remedy)


def _check_extras(place: str, role: str, fields: dict[str, Any]) -> None:
    if "weight" in fields:
        weight = fields["weight"]
        if role != "assistant":
            reason = f"{place}.weight is allowed only on assistant messages, but the message's role is '{role}'"
            raise BadRow("invalid_weight", reason, "Remove 'weight' from this message.")
        if isinstance(weight, bool) or weight not in (0, 1):
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            shown_weight = weight if is_number else kind_of(weight)
            reason = f"{place}.weight is {shown_weight}, but must be 0 or 1"
            remedy = "Use 0 to exclude the message from training. Otherwise, use 1 or omit 'weight'."
            raise BadRow("invalid_weight", reason, remedy)
    for key in ("name", "tool_call_id"):
        if key in fields and not isinstance(fields[key], str):
            reason = f"{place}.{key} is {kind_of(fields[key])}, not a string"
            raise BadRow("invalid_name", reason, f"Use a string, or omit '{key}'.")
