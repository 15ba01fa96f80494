"""What pydantic found wrong with a request, in plain words and without its own names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from catalog.spec.integrations import NAME_PATTERN
from catalog.spec.lora import INITIAL_PATTERN, MODULE_PATTERN, TARGET_PATTERN
from catalog.spec.strict import LABEL_PATTERN

Problem = dict[str, Any]
Location = tuple[int | str, ...]

_LABEL = (
    "a label: letters, digits, '.', '_' and '-', at most 64 of them, the first a letter or a digit; "
    "no slash, no space, no control character"
)
_PATTERNS = {
    LABEL_PATTERN: _LABEL,
    r"^[^\x00-\x1f\x7f]+$": "a text without control characters",
    NAME_PATTERN: "a name without control characters and without any of / \\ # ? % :",
    INITIAL_PATTERN: "'default', 'gaussian', 'pissa', 'pissa_niter_N' with N from 1 to 99, or 'olora'",
    MODULE_PATTERN: (
        "the name of a layer, of letters, digits, '_' and '.' ('all-linear', and 're:' with an expression, "
        "stand alone and in no list)"
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
    "string_type": "a text",
    "string_unicode": "a text of valid Unicode",
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
    "literal_error": "{expected}",
}


def by_field(problems: Iterable[tuple[str, Problem]]) -> dict[str, list[Problem]]:
    """Together what is about one path, in order; nothing of an object where more is known of a field in it."""
    grouped: dict[str, list[Problem]] = {}
    for path, problem in problems:
        grouped.setdefault(path, []).append(problem)
    for path in [path for path in grouped if any(other.startswith(f"{path}.") for other in grouped)]:
        del grouped[path]  # another branch of the same union got further
    return grouped


def field_path(steps: Sequence[int | str], body: Any, *, is_missing: bool) -> str:
    """Dotted, without the names that pydantic gives to branches of a union."""
    found: list[str] = []
    for step in steps[:-1] if is_missing else steps:
        if _leads_on(body, step):
            body = body[step]
            found.append(str(step))
    if is_missing and steps:
        found.append(str(steps[-1]))
    return ".".join(found)


def _leads_on(body: Any, step: int | str) -> bool:
    """Whether `step` is a field or an item; else it is pydantic's name for a branch of a union."""
    if isinstance(body, list):
        return isinstance(step, int) and step < len(cast(list[Any], body))
    return isinstance(body, dict) and step in body


def expectation(group: Sequence[Problem]) -> str:
    """What comes after the field's name: `must be a number or 'auto'`."""
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
    if kind in _BOUNDS:
        shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        return _BOUNDS[kind].format(**shown)
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"a text of the form {context['pattern']}")
    return f"valid ({problem['msg']})"
