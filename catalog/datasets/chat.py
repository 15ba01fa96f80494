"""Validation of one line of a chat data set, with a reason and a remedy for each error.

It is strict on purpose: JSON parsers disagree on duplicate keys, NaN and very long numbers, so these are rejected.
Error messages never quote the content of a chat message.
"""

from __future__ import annotations

import json
import math
from typing import Any, NotRequired, TypedDict, cast

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "weight", "name", "tool_call_id"})
UNSUPPORTED = frozenset({"tools", "parallel_tool_calls", "functions", "tool_calls", "function_call", "audio"})
MESSAGE_FORM = '{"role": "user", "content": "..."}'
CHAT_FORM = f'[{MESSAGE_FORM}, {{"role": "assistant", "content": "..."}}]'
TEXT_PART = '{"type": "text", "text": "..."}'
PART_FORM = f"Use {TEXT_PART}."
TEXT_OR_PARTS = f"Use a string, or a list of one or more text parts: [{TEXT_PART}]."
MAX_DIGITS = 19
"""Number of decimal digits of the largest 64-bit integer."""
MAX_NAMED_CHARS = 40


class ChatMessage(TypedDict):
    """One message of a conversation."""

    role: str
    content: str
    weight: NotRequired[int]
    """0: the model reads the message but does not train on it. Only for assistant messages."""
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


class BadRow(Exception):
    """An invalid row. `reason` begins in lower case, `remedy` is a sentence."""

    def __init__(self, code: str, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.remedy = remedy


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse one line of any kind of data set. Raises BadRow, and nothing else, for arbitrary bytes."""
    row = _parse_json(line)
    if not isinstance(row, dict):
        reason = f"the row is {kind_of(row)}, not an object"
        raise BadRow("row_not_object", reason, 'Use an object, such as {"messages": [...]}.')
    return cast(dict[str, Any], row)


def is_supervised(messages: list[ChatMessage]) -> bool:
    """Return whether the row has tokens to train on."""
    return any(m["role"] == "assistant" and m["content"].strip() and m.get("weight", 1) for m in messages)


def only_last_learnt(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Return the messages with weight 0 on every answer except the last one."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    earlier = set(answers[:-1])
    return [ChatMessage({**turn, "weight": 0}) if index in earlier else turn for index, turn in enumerate(messages)]


def _parse_json(line: bytes) -> Any:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        return row
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not valid UTF-8"
        raise BadRow("invalid_utf8", reason, "Save the file as UTF-8.") from error
    except UnicodeEncodeError as error:
        reason = f"\\u{ord(error.object[error.start]):04x} is half of a surrogate pair"
        remedy = "Use the character itself, such as an emoji, or both \\u escapes of its pair."
        raise BadRow("lone_surrogate", reason, remedy) from error
    except json.JSONDecodeError as error:
        reason = f"the JSON is invalid at column {error.colno}: {error.msg.lower().removesuffix(' at')}"
        remedy = "Write each row as one JSON object on a single line, for example with Python's json.dumps()."
        raise BadRow("invalid_json", reason, remedy) from error
    except RecursionError as error:
        remedy = "Flatten the row: a valid row has at most six levels of objects and lists."
        raise BadRow("json_too_deep", "the JSON is nested too deeply", remedy) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        reason = f"the key {quoted(duplicate)} appears more than once in the same object"
        raise BadRow("duplicate_key", reason, "Keep only one occurrence of the key.")
    return row


def _constant(name: str) -> Any:
    raise BadRow("number_not_finite", f"{name} is not valid JSON", "Omit the value, or use a finite number.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        reason = f"the number {_shortened(text)} is out of range"
        raise BadRow("number_not_finite", reason, "Use a number between -1.79e308 and 1.79e308.")
    return value


def _int(text: str) -> int:
    num_digits = len(text.lstrip("-"))
    if num_digits > MAX_DIGITS:
        reason = f"the integer {_shortened(text)} has {num_digits:,} digits, but the maximum is {MAX_DIGITS}"
        raise BadRow("number_too_large", reason, "Use a string for a longer number.")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)


def check_chat(row: dict[str, Any]) -> list[ChatMessage]:
    """Return the messages of one row. Raises BadRow."""
    if row.keys() != {"messages"}:
        _check_row_keys(row)
    messages = row["messages"]
    if not isinstance(messages, list):
        reason = f"messages is {kind_of(messages)}, not a list"
        raise BadRow("messages_not_list", reason, f"Use a list of messages, such as {CHAT_FORM}.")
    for index, message in enumerate(cast(list[Any], messages)):
        check_message(f"messages[{index}]", message)
    checked = cast(list[ChatMessage], messages)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in checked):
        reason = "the chat has no assistant message with text"
        raise BadRow("no_assistant_turn", reason, "Add the assistant message to train on, or remove the row.")
    return checked


def _check_row_keys(row: dict[str, Any]) -> None:
    for key in row:
        if key in UNSUPPORTED:
            remedy = "Remove this key: only text messages are supported."
            raise BadRow("tools_unsupported", f"the key {quoted(key)} is not supported", remedy)
        if key != "messages":
            remedy = 'Remove the key, or correct its spelling. A chat row has only the key "messages".'
            raise BadRow("unknown_key", f"the row has an unknown key, {quoted(key)}", remedy)
    raise BadRow("messages_missing", 'the key "messages" is missing', 'Use {"messages": [...]}.')


def check_message(place: str, message: Any) -> None:
    """Validate a message, and join content that is given as parts of text. `place` is its name in error messages.

    Raises BadRow.
    """
    if not isinstance(message, dict):
        reason = f"{place} is {kind_of(message)}, not an object"
        raise BadRow("message_not_object", reason, f"Use an object for each message, such as {MESSAGE_FORM}.")
    fields = cast(dict[str, Any], message)
    if not fields.keys() <= MESSAGE_KEYS:
        _refuse_key(place, next(key for key in fields if key not in MESSAGE_KEYS))
    role = fields.get("role")
    if role not in ROLES:
        shown_role = quoted(role) if isinstance(role, str) else kind_of(role)
        reason = (
            f"{place}.role is {shown_role}, which is not a valid role"
            if "role" in fields
            else f"{place}.role is missing"
        )
        raise BadRow("invalid_role", reason, f"Use one of these roles: {', '.join(ROLES)}.")
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(f"{place}.content", fields["content"])
    if not isinstance(fields.get("content"), str):
        given = f"{kind_of(fields['content'])}, not text" if "content" in fields else "missing"
        raise BadRow("content_not_text", f"{place}.content is {given}", TEXT_OR_PARTS)
    if len(fields) > 2:
        _check_extras(place, role, fields)


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
    if key in UNSUPPORTED:
        remedy = "Remove this key: only text messages are supported."
        raise BadRow("tools_unsupported", f"{place}.{key} is not supported", remedy)
    allowed = ", ".join(sorted(MESSAGE_KEYS))
    remedy = f"Remove the key, or correct its spelling. A message can have these keys: {allowed}."
    raise BadRow("unknown_key", f"{place} has an unknown key, {quoted(key)}", remedy)


def _check_extras(place: str, role: str, fields: dict[str, Any]) -> None:
    if "weight" in fields:
        weight = fields["weight"]
        if role != "assistant":
            reason = f"{place}.weight is allowed only on assistant messages, but the message's role is '{role}'"
            raise BadRow("invalid_weight", reason, "Remove 'weight' from this message.")
        if type(weight) is not int or weight not in (0, 1):
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            shown_weight = weight if is_number else kind_of(weight)
            reason = f"{place}.weight is {shown_weight}, but must be 0 or 1"
            remedy = "Use 0 to exclude the message from training. Otherwise, use 1 or omit 'weight'."
            raise BadRow("invalid_weight", reason, remedy)
    for key in ("name", "tool_call_id"):
        if key in fields and not isinstance(fields[key], str):
            reason = f"{place}.{key} is {kind_of(fields[key])}, not a string"
            raise BadRow("invalid_name", reason, f"Use a string, or omit '{key}'.")


def quoted(text: str) -> str:
    """Return a key or role for an error message: shortened, quoted, and without control characters."""
    return ascii(_shortened(text))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_NAMED_CHARS else text[:MAX_NAMED_CHARS] + "..."


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type for an error message."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
