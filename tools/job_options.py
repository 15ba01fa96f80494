"""Writes the options of `lorry jobs submit`, from the model that validates the request. The client has no copy of it.

An option has the meaning of its field, the limits and the default. A field of several methods is one option; its path
has METHOD in place of the method.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from catalog.spec.job import JobRequest
from catalog.spec.methods import MethodType
from tools.json_schema import Json, number_limits
from tools.reference_fields import leaves, texts

METHODS = get_args(MethodType)
NO_OPTION = {"model", "training_file", "hyperparameters", "integrations", "resources"}
"""Arguments, deprecated fields, lists of objects, and fields with one value."""


def job_options(model: type[BaseModel] = JobRequest) -> str:
    """Return the JSON file: by dotted path, the type of the option, its choices and its help."""
    found: dict[str, list[tuple[str, Json]]] = {}
    for path, field, schema in leaves(model):
        if path.partition(".")[0] in NO_OPTION or path.startswith("evaluation.samples."):
            continue
        method, common = _method(path)
        found.setdefault(common, []).append((method, {**_type(schema), "help": _text(field, schema)}))
    options = {path: {**variants[0][1], "help": _help(variants)} for path, variants in found.items()}
    return json.dumps(options, indent=1, ensure_ascii=False) + "\n"


def _method(path: str) -> tuple[str, str]:
    """Return the method that the field belongs to, "" for none, and the path with METHOD in its place."""
    parts = path.split(".")
    if parts[0] != "method" or len(parts) == 2:
        return "", path
    return parts[1], ".".join(("method", "METHOD", *parts[2:]))


def _text(field: FieldInfo, schema: Json) -> str:
    """Return the meaning, the limits and the default. The meaning is the description of the choices if there are any,
    else its first sentence."""
    meaning, default = texts(field)
    meaning = meaning if _type(schema)["type"] == "choice" else meaning.partition(". ")[0]
    shown = default.replace("`auto`: ", "").replace("`", "")
    parts = [f"{meaning.rstrip('.')}."]
    limits = next((number_limits(_usual(part)) for part in _parts(schema)), None)
    parts += [f"{limits[0].upper()}{limits[1:]}."] if limits else []
    parts += [] if shown in ("required", "none", "{}", "false") else [f"Default: {shown}."]
    return " ".join(parts)


def _usual(schema: Json) -> Json:
    """Return the schema without a maximum that no user reaches."""
    return {name: limit for name, limit in schema.items() if name != "maximum" or limit < 1_000_000}


def _help(variants: list[tuple[str, Json]]) -> str:
    """Return the help of a field, with the methods that it applies to unless these are all."""
    ordered = sorted(variants, key=lambda variant: variant[1]["help"])
    by_text = [(text, [name for name, _ in group]) for text, group in groupby(ordered, lambda each: each[1]["help"])]
    if len(by_text) == 1 and by_text[0][1] in ([""], sorted(METHODS), list(METHODS)):
        return by_text[0][0]
    by_text.sort(key=lambda entry: METHODS.index(entry[1][0]))
    return " ".join(f"For {', '.join(names)}: {text}" for text, names in by_text)


def _type(schema: Json) -> dict[str, Any]:
    """Return the type of an option. It can't pass `auto` and `null`, which `--set` can."""
    parts = list(_parts(schema))
    lists = next((part for part in parts if part.get("type") == "array"), None)
    if lists is not None:
        return {"type": f"{lists['items']['type']} list"}
    (part,) = parts
    match part:
        case {"enum": choices}:
            return {"type": "choice", "choices": choices}
        case {"type": "object", "additionalProperties": {"type": kind}}:
            return {"type": f"{kind} map"}
        case _:
            return {"type": part["type"]}


def _parts(schema: Json) -> Iterator[Json]:
    for part in schema.get("anyOf", [schema]):
        if part.get("type") != "null" and "const" not in part:
            yield part
