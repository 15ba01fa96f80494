"""Translates pydantic's validation errors into messages without pydantic's own names. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

from catalog.spec.integrations import NAME_PATTERN
from catalog.spec.lora import INITIAL_PATTERN, MODULE_PATTERN, TARGET_PATTERN
from catalog.spec.model_fields import LABEL_PATTERN

MAX_SHOWN = 80
"""Maximum number of characters of a value in a message."""
Problem = dict[str, Any]
Location = tuple[int | str, ...]

_LABEL = (
    "a label: letters, digits, '.', '_' and '-', at most 64 of them, the first a letter or a digit; "
    "no slash, no space, no control character"
)
_PATTERNS = {
    LABEL_PATTERN: _LABEL,
    r"^[^\x00-\x1f\x7f]+$": "a string without control characters",
    r"^[\x21-\x7e]+$": "one line of visible ASCII characters without spaces",
    NAME_PATTERN: "a name without control characters and without any of / \\ # ? % :",
    INITIAL_PATTERN: "'default', 'gaussian', 'pissa', 'pissa_niter_N' with N from 1 to 99, or 'olora'",
    MODULE_PATTERN: (
        "the name of a layer, of letters, digits, '_' and '.' ('all-linear' and 're:' expressions are not allowed "
        "in a list)"
    ),
    TARGET_PATTERN: "'re:' and a regular expression of at most 256 characters",
}
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string of valid Unicode",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} characters long",
    "string_too_long": "at most {max_length} characters long",
    "too_long": "at most {max_length} items long",
    "too_short": "at least {min_length} items long",
}

_IN_JSON = {"True": "true", "False": "false", "None": "null"}
_PYTHON_NAME = re.compile(r"\b(?<!')(?:True|False|None)(?!')\b")


def by_field(problems: Iterable[tuple[str, Problem]]) -> dict[str, list[Problem]]:
    """Group the problems by path, in order. Problems of an object are dropped if a field in it has problems."""
    grouped: dict[str, list[Problem]] = {}
    for path, problem in problems:
        grouped.setdefault(path, []).append(problem)
    ordered = sorted(f"{path}." for path in grouped)  # a path precedes the paths in it: a body has many thousand fields
    for path in [one[:-1] for one, following in pairwise(ordered) if following.startswith(one)]:
        del grouped[path]  # another branch of the same union matched further
    return grouped


def field_path(steps: Sequence[int | str], body: Any, *, is_missing: bool) -> str:
    """Return the dotted path of a field, without pydantic's names for the branches of a union."""
    found: list[str] = []
    for step in steps[:-1] if is_missing else steps:
        if _leads_on(body, step):
            body = body[step]
            found.append(str(step))
    if is_missing and steps:
        found.append(str(steps[-1]))
    return ".".join(found)


def _leads_on(body: Any, step: int | str) -> bool:
    """Return whether `step` is a field or an item. If not, it is pydantic's name for a branch of a union."""
    if isinstance(body, list):
        return isinstance(step, int) and step < len(cast(list[Any], body))
    return isinstance(body, dict) and step in body


def value_text(value: Any) -> str:
    """Return a value for a message: a string in single quotes, any other value as JSON, shortened to MAX_SHOWN."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def expectation(group: Sequence[Problem]) -> str:
    """Return the text that follows the field's name in a message: `must be a number or 'auto'`."""
    for problem in group:
        if problem["type"] == "value_error":
            text = str(problem.get("ctx", {}).get("error", problem["msg"])).rstrip(".")
            return text if text.startswith("must") else f"is invalid: {text}"
    phrases = dict.fromkeys(_phrase(problem) for problem in group)
    return "must be " + " or ".join(phrases)


def _phrase(problem: Problem) -> str:
    kind = problem["type"]
    context: dict[str, Any] = problem.get("ctx") or {}
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return _PYTHON_NAME.sub(lambda name: _IN_JSON[name[0]], context["expected"])
    if kind in _BOUNDS:
        shown = {name: f"{value:.15g}" if isinstance(value, float) else value for name, value in context.items()}
        return re.sub(r"\b1 (character|item)s\b", r"1 \1", _BOUNDS[kind].format(**shown))
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"a string that matches {context['pattern']}")
    return f"valid ({problem['msg']})"
