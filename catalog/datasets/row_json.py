"""Parses one line of a data set strictly as JSON, and defines the error of an invalid row.

JSON parsers disagree on duplicate keys, NaN and very long numbers, so these are rejected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, cast

from catalog.error_texts import ErrorText

MAX_DIGITS = 19
"""Number of decimal digits of the largest 64-bit integer."""
MAX_NESTING = 64
"""Maximum number of levels of lists and objects in any JSON of a client. It is far below the depth at which a parser, a
template or the database's driver fails, which depends on the size of the stack."""
MAX_NAMED_CHARS = 40


class BadRow(Exception):
    """An invalid row. `reason` is its message without a final period, and begins in lower case."""

    def __init__(self, text: str | ErrorText, /, **values: str | float) -> None:
        """text: a name in the tables of catalog.error_texts, with `values` for its placeholders; or a text."""
        self.text = ErrorText.of(text, param=None, **values) if isinstance(text, str) else text
        super().__init__(self.text.message)
        self.code = self.text.code
        self.reason = self.text.message.removesuffix(".")
        self.remedy = self.text.remedy


class TooDeep(BadRow):
    """A JSON value with more than MAX_NESTING levels."""


class NotObject(BadRow):
    """The JSON value of a line is not an object."""


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse one line of any kind of data set. Raises BadRow, and nothing else, for arbitrary bytes."""
    row = _parse_line(line)
    if not isinstance(row, dict):
        raise NotObject("row_not_object", kind=kind_of(row))
    return cast(dict[str, Any], row)


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_utf8", start=error.start + 1) from error
    except json.JSONDecodeError as error:
        raise BadRow("row_not_json", colno=error.colno, problem=problem_of(error)) from error


def is_too_deep(value: Any) -> bool:
    """Return whether a JSON value has more than MAX_NESTING levels of lists and objects. Not recursive."""
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in cast("Iterable[Any]", outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _too_deep() -> TooDeep:
    return TooDeep("json_too_deep", max_nesting=MAX_NESTING)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BadRow("duplicate_key", duplicate=quoted(duplicate))
    return row


def _constant(name: str) -> Any:
    raise BadRow("number_not_json", name=name)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadRow("number_out_of_range", text=_shortened(text))
    return value


def _int(text: str) -> int:
    num_digits = len(text.lstrip("-"))
    if num_digits > MAX_DIGITS:
        raise BadRow("number_too_large", text=_shortened(text), num_digits=num_digits, max_digits=MAX_DIGITS)
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)


def parse_json(text: str) -> Any:
    """Parse strict JSON. Raises BadRow or json.JSONDecodeError."""
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise _too_deep() from error
    if text.count("[") + text.count("{") > MAX_NESTING and is_too_deep(value):
        raise _too_deep()
    if "\\ud" in text or "\\uD" in text:
        check_characters(value)
    return value


def check_characters(value: Any) -> None:
    """Raise BadRow if a text in the JSON value contains half of a surrogate pair, which no encoding has, or if the
    value is nested too deeply."""
    if is_too_deep(value):
        raise _too_deep()
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone_surrogate", unit=ord(error.object[error.start])) from error


def problem_of(error: json.JSONDecodeError) -> str:
    """Return what is wrong with invalid JSON, without its place: `unterminated string` for `Unterminated string
    starting at`."""
    return error.msg[:1].lower() + error.msg[1:].removesuffix(" at").removesuffix(" starting")


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
