"""Validates the messages of a row, in OpenAI's format. Error messages never quote the content of a message."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, cast

from catalog.datasets.row_json import BadRow, kind_of, quoted
from catalog.datasets.tools import ToolCall, check_tool_calls, checked_call

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CALLS = ("tool_calls", "function_call")
"""`function_call` and the role `function` are OpenAI's deprecated format."""
MESSAGE_KEYS = frozenset({"role", "content", "weight", "name", "tool_call_id", *CALLS})
NOT_KEPT = frozenset({"annotations", "audio", "refusal", *CALLS})
"""Keys that are ignored without a value, as in a response that was saved completely."""
MESSAGE_FORM = '{"role": "user", "content": "..."}'
CHAT_FORM = f'[{MESSAGE_FORM}, {{"role": "assistant", "content": "..."}}]'
TEXT_PART = '{"type": "text", "text": "..."}'


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


def check_messages(place: str, given: Any, *, form: str) -> list[ChatMessage]:
    """Return the messages in one form: content as text, and deprecated function calls as tool calls.

    form: how to write a list of messages in this place. Raises BadRow.
    """
    if not isinstance(given, list):
        raise BadRow("messages_not_list", place=place, kind=kind_of(given), form=form)
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
            raise BadRow("unknown_tool_call_id", place=place, index=index, tool_call_id=quoted(message["tool_call_id"]))
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
        raise BadRow("message_not_object", place=place, kind=kind_of(message))
    fields = cast(dict[str, Any], message)
    for key in NOT_KEPT & fields.keys():
        if fields[key] is None or (key == "annotations" and fields[key] == []):
            del fields[key]
    if not fields.keys() <= MESSAGE_KEYS:
        _refuse_key(place, next(key for key in fields if key not in MESSAGE_KEYS))
    if "role" not in fields:
        raise BadRow("role_missing", place=place)
    role = fields["role"]
    if role not in ROLES:
        shown_role = quoted(role) if isinstance(role, str) else kind_of(role)
        raise BadRow("invalid_role", place=place, shown_role=shown_role)
    _check_calls(place, role, fields)
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(f"{place}.content", fields["content"])
    if fields.get("content") is None and any(key in fields for key in CALLS):
        fields["content"] = ""
    if not isinstance(fields.get("content"), str):
        if "content" in fields:
            raise BadRow("content_not_text", place=place, kind=kind_of(fields["content"]))
        raise BadRow("content_missing", place=place)
    if len(fields) > 2:
        _check_extras(place, role, fields)


def _check_calls(place: str, role: str, fields: dict[str, Any]) -> None:
    for key in CALLS:
        if key in fields and role != "assistant":
            raise BadRow("calls_of_another_role", place=place, key=key, role=role)
    if all(key in fields for key in CALLS):
        raise BadRow("both_kinds_of_calls", place=place)
    if "tool_calls" in fields:
        fields["tool_calls"] = check_tool_calls(f"{place}.tool_calls", fields["tool_calls"])


def _as_tool_message(place: str, message: dict[str, Any], last_call_id: str | None) -> None:
    """Turn the result of a deprecated function call into a tool message. It answers the last call."""
    if last_call_id is None:
        given = place.partition("[")[0]
        raise BadRow("function_result_without_call", place=place, given=given)
    message["role"], message["tool_call_id"] = "tool", last_call_id


def _joined(place: str, parts: list[Any]) -> str:
    """Join parts of text without a separator, as a chat template does. Raises BadRow."""
    if not parts:
        raise BadRow("content_empty_list", place=place)
    for index, part in enumerate(parts):
        position = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise BadRow("content_part_not_object", place=place, index=index, kind=kind_of(part))
        _check_part(position, cast(dict[str, Any], part))
    return "".join(part["text"] for part in parts)


def _check_part(position: str, part: dict[str, Any]) -> None:
    kind = part.get("type")
    if kind != "text":
        shown_type = quoted(kind) if isinstance(kind, str) else kind_of(kind)
        if "type" not in part:
            raise BadRow("content_part_type_missing", position=position)
        raise BadRow("content_part_type_unsupported", position=position, shown_type=shown_type)
    if not isinstance(part.get("text"), str):
        if "text" in part:
            raise BadRow("content_part_text_invalid", position=position, kind=kind_of(part["text"]))
        raise BadRow("content_part_text_missing", position=position)
    if len(part) > 2:
        unknown = next(key for key in part if key not in ("type", "text"))
        raise BadRow("content_part_key_unknown", position=position, unknown=quoted(unknown))


def _refuse_key(place: str, key: str) -> None:
    if key in NOT_KEPT:
        raise BadRow("content_unsupported", place=place, key=key)
    allowed = ", ".join(sorted(MESSAGE_KEYS))
    raise BadRow("unknown_message_key", place=place, key=quoted(key), allowed=allowed)


def _check_extras(place: str, role: str, fields: dict[str, Any]) -> None:
    if "weight" in fields:
        weight = fields["weight"]
        if role != "assistant":
            raise BadRow("weight_of_another_role", place=place, role=role)
        if isinstance(weight, bool) or weight not in (0, 1):
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            shown_weight = weight if is_number else kind_of(weight)
            raise BadRow("invalid_weight", place=place, shown_weight=shown_weight)
    for key in ("name", "tool_call_id"):
        if key in fields and not isinstance(fields[key], str):
            raise BadRow("message_name_not_text", place=place, key=key, kind=kind_of(fields[key]))
