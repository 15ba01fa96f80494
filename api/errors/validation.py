"""Turns pydantic's validation errors into one message with a remedy.

`loc` becomes a dotted path ("lora.rank"). Branches of a union become "a whole number or 'auto'". For an unknown name,
the nearest known name is suggested. OpenAI endpoints that Lorry does not have, and field names of other trainers, have
messages of their own.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Sequence
from functools import cache
from itertools import islice
from typing import Any, cast, get_args

from pydantic import BaseModel

from catalog.error_texts import ErrorText
from catalog.errors import InvalidRequest
from catalog.spec.model_fields import fields_of, models_in
from catalog.spec.validation_messages import Location, Problem, by_field, expectation, field_path

MAX_LISTED = 5
MAX_PATH_CHARS = 200
"""Maximum number of characters of a path in an error. The names in it are the client's."""
AGAIN = "Correct the request and send it again."
SECRET_FIELDS = frozenset({"api_key", "token", "secret"})
INSTEAD_OF_REINFORCEMENT = (
    "Use a preference method (dpo, orpo, simpo, kto). Set evaluation.samples to see sample outputs of a job."
)
NOT_OFFERED = {
    re.compile(r"/v1/fine_tuning/alpha/graders/[^/]*"): "graders_not_offered",
    re.compile(r"/v1/(responses|embeddings|assistants|threads|moderations|images|audio)(/.*)?"): "endpoint_not_offered",
    re.compile(r"/v1/organization(/.*)?"): "administration_not_offered",
}
"""The error of each group of paths that Lorry does not support."""


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


def find(path: str) -> str | None:
    """Return the name of the error's text; None for other paths."""
    return next((name for paths, name in NOT_OFFERED.items() if paths.fullmatch(path)), None)


OTHER_NAMES = {
    "load_in_4bit": "'quantization' with the value \"nf4\"",
    "load_in_8bit": "'quantization' with the value \"int8\"",
    "quantisation": "'quantization'",
    "lr": "'optimizer.learning_rate'",
    "r": "'lora.rank'",
    "lora_r": "'lora.rank'",
    "lora_rank": "'lora.rank'",
    "lora_alpha": "'lora.alpha'",
    "lora_dropout": "'lora.dropout'",
    "lr_scheduler_type": "'schedule.type'",
    "optim": "'optimizer.type'",
    "adam_beta1": "'optimizer.beta1'",
    "adam_beta2": "'optimizer.beta2'",
    "adam_epsilon": "'optimizer.eps'",
    "max_seq_length": "'max_length'",
    "max_seq_len": "'max_length'",
    "sequence_len": "'max_length'",
    "cutoff_len": "'max_length'",
    "eval_steps": "'evaluation.every_steps'",
    "save_steps": "'checkpoint_every_steps'",
    "load_best_model_at_end": "'evaluation.keep' with the value \"best\"",
    "early_stopping_patience": "'early_stopping.patience'",
}
"""Lorry's field, by the field's name in transformers, PEFT, TRL, bitsandbytes or another trainer."""

OLD_NAMES = {
    "functions": ("tools", 'Use \'tools\', with {"type": "function", "function": ...} for each function.'),
    "function_call": ("tool_choice", "Use 'tools', and 'tool_choice' with the value \"auto\" or \"none\"."),
}
"""By a deprecated parameter of OpenAI: the parameter that replaced it, and the remedy."""

UNSUPPORTED_VALUES = {
    "tool_choice": 'Lorry does not force a model to call a tool. Use "auto", and ask for the call in the messages.',
    "response_format.type": "Lorry does not force a model to write JSON. Train the model on answers in JSON, or ask "
    "for JSON in the messages, and leave out 'response_format'.",
    "store": "Lorry does not store answers. Leave out 'store', and keep the answers that you need.",
    "stream_options.include_obfuscation": "Leave it out.",
    "echo": "Leave out 'echo', and put the prompt before the answer.",
    "best_of": "Leave out 'best_of'. To choose among several answers, use 'n' and 'logprobs'.",
}
"""The remedy, by a parameter of OpenAI of which Lorry supports only the default or some values."""


def replacement(path: str, known: Collection[str]) -> str | None:
    """Return the remedy for a deprecated parameter; None if a request with the fields `known` lacks its successor."""
    successor, remedy = OLD_NAMES.get(path, ("", ""))
    return remedy if successor in known else None


def known_elsewhere(path: str) -> str | None:
    """Return a question with Lorry's field for the last part of `path`; None if the name is not in OTHER_NAMES."""
    alternative = OTHER_NAMES.get(path.rpartition(".")[2])
    return None if alternative is None else f"Did you mean {alternative}?"
