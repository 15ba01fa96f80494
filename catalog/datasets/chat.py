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
PART_FORM = 'Use {"type": "text", "text": "..."}.'
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
        reason = "the line contains an unpaired surrogate escape (\\ud…)"
        remedy = "Use the character itself, such as an emoji, or a complete pair of \\u escapes."
        raise BadRow("lone_surrogate", reason, remedy) from error
    except json.JSONDecodeError as error:
        reason = f"the JSON is invalid at column {error.colno}: {error.msg.lower().removesuffix(' at')}"
        raise BadRow(
            "invalid_json", reason, "Put each row on one line, and generate it with a JSON library."
        ) from error
    except RecursionError as error:
        remedy = "Flatten the row: a valid row has at most six levels of objects and lists."
        raise BadRow("json_too_deep", "the JSON is nested too deeply", remedy) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        reason = f"the key {quoted(duplicate)} appears more than once in the same object"
        raise BadRow("duplicate_key", reason, "Keep only one of them.")
    return row


def _constant(name: str) -> Any:
    raise BadRow("number_not_finite", f"{name} is not valid JSON", "Omit the value, or use a finite number.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRow("number_not_finite", "a number is out of range", "Use a number between -1.79e308 and 1.79e308.")
    return value


def _int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        reason = f"an integer has more than {MAX_DIGITS} digits"
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
        raise BadRow(
            "messages_not_list", reason, 'Use a list of messages, such as [{"role": "user", "content": "..."}].'
        )
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
            raise BadRow(
                "tools_unsupported", f"{key!r} is not supported", "Remove it: only text messages are supported."
            )
        if key != "messages":
            remedy = 'Remove the key, or correct its spelling. A chat row has only the key "messages".'
            raise BadRow("unknown_key", f"the row has the unknown key {quoted(key)}", remedy)
    raise BadRow("messages_missing", 'the key "messages" is missing', 'Use {"messages": [...]}.')


def check_message(place: str, message: Any) -> None:
    """Validate a message, and join content that is given as parts of text. `place` is its name in error messages.

    Raises BadRow.
    """
    if not isinstance(message, dict):
        reason = f"{place} is {kind_of(message)}, not an object"
        raise BadRow("message_not_object", reason, 'Use {"role": "user", "content": "..."}.')
    fields = cast(dict[str, Any], message)
    if not fields.keys() <= MESSAGE_KEYS:
        _refuse_key(place, next(key for key in fields if key not in MESSAGE_KEYS))
    role = fields.get("role")
    if role not in ROLES:
        shown_role = quoted(role) if isinstance(role, str) else kind_of(role)
        reason = (
            f"{place}.role is {shown_role}, which is not a role" if "role" in fields else f"{place}.role is missing"
        )
        raise BadRow("invalid_role", reason, f"Use one of these roles: {', '.join(ROLES)}.")
    if isinstance(fields.get("content"), list):
        fields["content"] = _joined(f"{place}.content", fields["content"])
    if not isinstance(fields.get("content"), str):
        given = f"{kind_of(fields['content'])}, not text" if "content" in fields else "missing"
        remedy = 'Use a string, or a list of text parts: [{"type": "text", "text": "..."}].'
        raise BadRow("content_not_text", f"{place}.content is {given}", remedy)
    if len(fields) > 2:
        _check_extras(place, role, fields)


def _joined(place: str, parts: list[Any]) -> str:
    """Join parts of text without a separator, as a chat template does. Raises BadRow."""
    if not parts:
        raise BadRow("content_not_text", f"{place} is an empty list", "Use a string, or at least one text part.")
    for index, part in enumerate(parts):
        position = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise BadRow("content_not_text", f"{position} is {kind_of(part)}, not an object", PART_FORM)
        fields = cast(dict[str, Any], part)
        kind = fields.get("type")
        if kind != "text":
            shown_type = quoted(kind) if isinstance(kind, str) else kind_of(kind)
            if "type" not in fields:
                raise BadRow("content_not_text", f"{position}.type is missing", PART_FORM)
            remedy = f"Remove images, audio and files: only text is supported. {PART_FORM}"
            raise BadRow("content_not_text", f"{position}.type is {shown_type}, not 'text'", remedy)
        if fields.keys() != {"type", "text"} or not isinstance(fields["text"], str):
            reason = f'{position} must have only the keys "type" and "text", and "text" must be a string'
            raise BadRow("content_not_text", reason, PART_FORM)
    return "".join(part["text"] for part in parts)


def _refuse_key(place: str, key: str) -> None:
    if key in UNSUPPORTED:
        raise BadRow(
            "tools_unsupported", f"{place}.{key} is not supported", "Remove it: only text messages are supported."
        )
    remedy = f"Remove it, or correct its spelling. A message can have these keys: {', '.join(sorted(MESSAGE_KEYS))}."
    raise BadRow("unknown_key", f"{place} has the unknown key {quoted(key)}", remedy)


def _check_extras(place: str, role: str, fields: dict[str, Any]) -> None:
    if "weight" in fields:
        weight = fields["weight"]
        if role != "assistant":
            reason = f"{place}.weight is allowed only on assistant messages"
            raise BadRow("invalid_weight", reason, "Remove it.")
        if type(weight) is not int or weight not in (0, 1):
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            shown_weight = weight if is_number else kind_of(weight)
            reason = f"{place}.weight is {shown_weight}, but must be 0 or 1"
            raise BadRow("invalid_weight", reason, "Use 0 to exclude the message from training, or omit the weight.")
    for key in ("name", "tool_call_id"):
        if key in fields and not isinstance(fields[key], str):
            raise BadRow(
                "invalid_name", f"{place}.{key} is {kind_of(fields[key])}, not a string", "Use a string, or omit it."
            )


def quoted(text: str) -> str:
    """Return a key or role for an error message: shortened, quoted, and without control characters."""
    return ascii(text if len(text) <= MAX_NAMED_CHARS else text[:MAX_NAMED_CHARS] + "...")


def kind_of(value: Any) -> str:
    """Return the name of a JSON value's type for an error message."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]
