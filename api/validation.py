"""What pydantic found wrong with a request, as one sentence a person can act on.

`loc` becomes a dotted path ("lora.rank"); branches of a union become "a whole number or 'auto'"; a name
that is not known gets the nearest one that is.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import BaseModel

from api.not_offered import INSTEAD_OF_REINFORCEMENT
from api.other_names import known_elsewhere
from catalog.errors import InvalidRequest
from catalog.integrations import NAME_PATTERN
from catalog.lora_spec import INITIAL_PATTERN, MODULE_PATTERN, TARGET_PATTERN

MAX_LISTED = 5
AGAIN = "Correct this and send the request again."
SECRET_FIELDS = frozenset({"api_key", "token", "secret"})
Problem = dict[str, Any]
Location = tuple[int | str, ...]

_LABEL = (
    "a label: letters, digits, '.', '_' and '-', at most 64 of them, the first a letter or a digit; "
    "no slash, no space, no control character"
)
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": _LABEL,
    r"^[A-Za-z0-9][\w.-]{0,63}$": _LABEL,
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


def explain(problems: Sequence[Problem], *, body: Any, route: Any = None) -> InvalidRequest:
    """One refusal for everything that was wrong; `param` and `code` are those of the first."""
    model = _body_model(route)
    grouped: dict[str, list[Problem]] = {}
    for problem in problems:
        grouped.setdefault(_path(problem, body), []).append(problem)
    for path in [path for path in grouped if any(other.startswith(f"{path}.") for other in grouped)]:
        del grouped[path]  # another branch of the same union got further
    told = [_tell(path, group, model) for path, group in grouped.items()]
    first_path, (message, remedy, code) = next(iter(grouped)), told[0]
    if len(told) > 1:
        message = " ".join(f"{sentence} {hint}".strip() for sentence, hint, _ in told[:MAX_LISTED])
        message += f" And {len(told) - MAX_LISTED} more." if len(told) > MAX_LISTED else ""
        remedy = ""
    return InvalidRequest(message, code=code, param=first_path or None, remedy=remedy or AGAIN)


def _path(problem: Problem, body: Any) -> str:
    """The dotted path of the field, without the names that pydantic gives to branches of a union."""
    where, *rest = cast(Location, problem["loc"]) or ("",)
    if problem["type"] == "json_invalid":
        return ""
    if where != "body":
        return ".".join(str(part) for part in rest)
    absent = problem["type"] == "missing"
    steps = rest[:-1] if absent and rest else rest
    found: list[str] = []
    for step in steps:
        if _leads_on(body, step):
            body = body[step]
            found.append(str(step))
    if absent and rest:
        found.append(str(rest[-1]))
    return ".".join(found)


def _leads_on(body: Any, step: int | str) -> bool:
    """Whether `step` is a field or an item; else it is pydantic's name for a branch of a union."""
    if isinstance(body, list):
        return isinstance(step, int) and step < len(cast(list[Any], body))
    return isinstance(body, dict) and step in body


def _tell(path: str, group: list[Problem], model: type[BaseModel] | None) -> tuple[str, str, str]:
    """(sentence, remedy if it is a special one, code) for all that is wrong at one path."""
    first = group[0]
    kind = first["type"]
    name = f"'{_ascii(path)}'" if path else "The body"
    if kind == "missing":
        return f"{name if path else 'A JSON body'} is missing.", "", _code(kind)
    if kind == "extra_forbidden":
        return f"There is no field {name}.", _nearest(path, model), _code(kind)
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it ends too early")
        return (
            f"The body is not JSON: {reason} at character {first['loc'][-1]}.",
            "Send one JSON object, in UTF-8, with Content-Type: application/json.",
            _code(kind),
        )
    is_reinforcement = path == "method.type" and first.get("input") == "reinforcement"
    remedy = f"Reinforcement isn't offered. {INSTEAD_OF_REINFORCEMENT}" if is_reinforcement else ""
    return f"{name} {_expectation(group)}{_it_was(path, first)}.", remedy, _code(kind)


def _code(kind: str) -> str:
    names = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
        "json_invalid": "invalid_json",
    }
    return names.get(kind, "invalid_value")


def _expectation(group: list[Problem]) -> str:
    for problem in group:
        if problem["type"] == "value_error":
            text = str(problem.get("ctx", {}).get("error", problem["msg"])).rstrip(".")
            return text if text.startswith("must") else f"is refused: {text}"
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


def _it_was(path: str, problem: Problem) -> str:
    """The refused value, if it is short and no secret."""
    value = problem.get("input")
    if path.rpartition(".")[2] in SECRET_FIELDS or not isinstance(value, str | int | float | bool | None):
        return ""
    shown = json.dumps(value)
    return f"; it was {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _nearest(path: str, model: type[BaseModel] | None) -> str:
    """The field that was probably meant, wherever in the request it belongs."""
    known = _all_paths(model) if model else []
    if not known:
        return "Leave it out."
    parent, _, name = path.rpartition(".")
    siblings = {item.rpartition(".")[2]: item for item in known if item.rpartition(".")[0] == parent}
    elsewhere = [item for item in known if item.rpartition(".")[2] == name]
    near = [siblings[found] for found in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)]
    if not near and path.startswith("method.") and (others := _methods_with(elsewhere)):
        return f"It belongs to the methods {', '.join(others)}: choose one in 'method.type', or leave it out."
    if not near and not elsewhere and (ours := known_elsewhere(path)):
        return ours
    near = near or elsewhere[:1] or difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Leave it out. Known here: {', '.join(siblings)}."


def _methods_with(paths: Sequence[str]) -> list[str]:
    return [path.split(".")[1] for path in paths if path.startswith("method.") and path.count(".") == 3]


def _all_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of a model's fields, outer ones first."""
    paths: list[str] = []
    inner: list[str] = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        for part in _models_in(field.annotation):
            inner += _all_paths(part, f"{prefix}{name}.")
    return paths + inner


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _body_model(route: Any) -> type[BaseModel] | None:
    field = getattr(route, "body_field", None)
    models = _models_in(getattr(getattr(field, "field_info", None), "annotation", None))
    return models[0] if models else None


def _ascii(text: str) -> str:
    return json.dumps(text[:200])[1:-1]
