"""Turns pydantic's validation errors into one message with a remedy.

`loc` becomes a dotted path ("lora.rank"). Branches of a union become "a whole number or 'auto'". For an unknown name,
the nearest known name is suggested.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import Any, cast, get_args

from pydantic import BaseModel

from api.errors.unsupported import INSTEAD_OF_REINFORCEMENT, UNSUPPORTED_VALUES, known_elsewhere, replacement
from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.spec.model_fields import fields_of, models_in
from catalog.spec.validation_messages import Location, Problem, by_field, expectation, field_path

MAX_LISTED = 5
MAX_PATH_CHARS = 200
"""Maximum number of characters of a path in an error. The names in it are the client's."""
AGAIN = "Correct the request and send it again."
SECRET_FIELDS = frozenset({"api_key", "token", "secret"})


def explain(problems: Sequence[Problem], *, body: Any, route: Any = None) -> InvalidRequest:
    """Return one error for all problems; `param` and `code` are those of the first."""
    model = _body_model(route)
    grouped = by_field((_path(problem, body), problem) for problem in problems)
    explained = [_explain(path, group, model) for path, group in islice(grouped.items(), MAX_LISTED)]
    first_path, (message, remedy, code) = next(iter(grouped)), explained[0]
    if len(explained) > 1:
        message = " ".join(f"{sentence} {hint}".strip() for sentence, hint, _ in explained)
        num_more = len(grouped) - MAX_LISTED
        message += " 1 more problem was found." if num_more == 1 else ""
        message += f" {num_more} more problems were found." if num_more > 1 else ""
        remedy = ""
    param = first_path[:MAX_PATH_CHARS] or None
    return InvalidRequest(ErrorText(code=code, message=message, remedy=remedy or AGAIN, param=param))


def _path(problem: Problem, body: Any) -> str:
    """Return the dotted path of the field, without pydantic's names of union branches."""
    where, *rest = cast(Location, problem["loc"]) or ("",)
    if problem["type"] == "json_invalid":
        return ""
    if where != "body":
        return ".".join(str(part) for part in rest)
    return field_path(rest, body, is_missing=problem["type"] == "missing")


def _explain(path: str, group: list[Problem], model: type[BaseModel] | None) -> tuple[str, str, str]:
    """Return (message, remedy or "" for the default, code) for all problems at one path."""
    first = group[0]
    kind = first["type"]
    name = f"'{_ascii(path)}'" if path else "The body"
    if kind == "missing":
        return f"{name if path else 'A JSON body'} is missing.", _types_to_choose(path, model), _code(kind)
    if kind == "extra_forbidden":
        return f"Unknown field {name}.", _nearest(path[:MAX_PATH_CHARS], model), _code(kind)
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "unexpected end")
        return (
            f"The request body is not valid JSON: {reason} at character {first['loc'][-1]}.",
            "Send one JSON object, encoded as UTF-8, with Content-Type: application/json.",
            _code(kind),
        )
    is_reinforcement = path == "method.type" and first.get("input") == "reinforcement"
    remedy = UNSUPPORTED_VALUES.get(path, "") if kind == "literal_error" else ""
    if is_reinforcement:
        remedy = f"Reinforcement fine-tuning is not supported. {INSTEAD_OF_REINFORCEMENT}"
    return f"{name} {expectation(group)}{_received(path, first)}.", remedy, _code(kind)


def _types_to_choose(path: str, model: type[BaseModel] | None) -> str:
    """Return the types to choose from if the missing field is an object with a discriminating `type`, else ""."""
    field = model.model_fields.get(path) if model else None
    for part in models_in(field.annotation if field else None):
        if "type" in part.model_fields and (names := get_args(part.model_fields["type"].annotation)):
            return f"Set its type to one of {', '.join(map(repr, names))}."
    return ""


def _code(kind: str) -> str:
    names = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
        "json_invalid": "invalid_json",
    }
    return names.get(kind, "invalid_value")


def _received(path: str, problem: Problem) -> str:
    """Return the rejected value as text, unless it is long, structured or a secret."""
    value = problem.get("input")
    if path.rpartition(".")[2] in SECRET_FIELDS or not isinstance(value, str | int | float | bool | None):
        return ""
    shown = json.dumps(value)
    return f"; got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _nearest(path: str, model: type[BaseModel] | None) -> str:
    """Return a remedy that suggests the field that was probably meant, at any level of the request."""
    known = _all_paths(model) if model else ()
    if not known:
        return "Remove it."
    if remedy := replacement(path, known):
        return remedy
    parent, _, name = path.rpartition(".")
    siblings = {item.rpartition(".")[2]: item for item in known if item.rpartition(".")[0] == parent}
    elsewhere = [item for item in known if item.rpartition(".")[2] == name]
    similar = [siblings[found] for found in difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)]
    if not similar and path.startswith("method.") and (others := _methods_with(elsewhere)):
        return f"It belongs to the methods {', '.join(others)}: set 'method.type' to one of them, or remove the field."
    if not similar and not elsewhere and (alternative := known_elsewhere(path)):
        return alternative
    similar = similar or elsewhere[:1] or difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if similar:
        return f"Did you mean '{similar[0]}'?"
    return f"Remove it. Known fields: {', '.join(siblings)}."


def _methods_with(paths: Sequence[str]) -> list[str]:
    return [path.split(".")[1] for path in paths if path.startswith("method.") and path.count(".") == 3]


@cache
def _all_paths(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the dotted paths of a model's fields, outer ones first."""
    return tuple(path for path, _ in fields_of(model, outer_first=True))


def _body_model(route: Any) -> type[BaseModel] | None:
    field = getattr(route, "body_field", None)
    return next(models_in(getattr(getattr(field, "field_info", None), "annotation", None)), None)


def _ascii(text: str) -> str:
    return json.dumps(text[:MAX_PATH_CHARS])[1:-1]
