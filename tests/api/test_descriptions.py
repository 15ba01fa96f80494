"""Every schema, field and parameter of the OpenAPI document has a description, with its unit and its default."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from lorry import models
from tools.reference_api import meaning

Json = dict[str, Any]
MIN_WORDS = 3
WITHOUT_CONTENT = frozenset(
    [
        "a",
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "with",
    ]
)
"""Words that add nothing to a name."""
UNITS = (
    (r"_(at(\[\w+\])?|until|since|finish)$", "Unix seconds"),
    (r"^(start_time|end_time|created|deadline|since|at|as_of|run_after)$", "Unix seconds"),
    (r"(^|_)seconds($|_)", "second"),
    (r"(^|_)bytes($|_)", "byte"),
    (r"(^|_)gigabytes$", "GB"),
    (r"(^|_)tokens($|_)", "token"),
    (r"(^|_)(num_|every_|min_|max_)?steps?$", "step"),
    (r"(^|_)accuracy$", "fraction"),
    (r"(^|_)(hours|minute|day|month)($|_)", "per |hour"),
)  # fmt: skip
"""Names of numbers, with the unit that the description must contain."""


def described(app: FastAPI) -> Iterator[tuple[str, str, Json]]:
    """Yield (place, name, schema with its description) of each parameter and each field."""
    document = app.openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                text = parameter.get("description") or meaning(parameter["schema"], document)
                yield f"{method} {path}", parameter["name"], {**parameter["schema"], "description": text}
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from _fields(f"{method} {path}", content["schema"], document)
    for name, schema in document["components"]["schemas"].items():
        yield from _fields(name, schema, document)


def _fields(place: str, schema: Json, document: Json) -> Iterator[tuple[str, str, Json]]:
    for name, field in schema.get("properties", {}).items():
        yield place, name, {**field, "description": meaning(field, document)}


def test_every_schema_has_a_description(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]

    assert [name for name, schema in schemas.items() if not _is_sentence(schema.get("description", ""))] == []


def test_every_field_and_parameter_has_a_description(app: FastAPI) -> None:
    found = list(described(app))

    assert len(found) > 1500
    assert [(place, name, field["description"]) for place, name, field in found if not _says(name, field)] == []


def test_every_field_of_the_sdk_has_a_meaning() -> None:
    classes = [
        node for node in ast.parse(Path(models.__file__).read_text("utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    texts = [
        (f"{one.name}.{ast.unparse(field.target)}", ast.unparse(text))
        for one in classes
        for field, text in pairwise([*one.body, ast.Pass()])
        if isinstance(field, ast.AnnAssign)
    ]

    assert len(texts) > 350
    assert [name for name, text in texts if len(text.split()) < MIN_WORDS] == []


def test_descriptions_write_id_in_capitals(app: FastAPI) -> None:
    document = app.openapi()
    schemas = [(name, schema["description"]) for name, schema in document["components"]["schemas"].items()]
    operations = [
        (path, operation["description"])
        for path, methods in document["paths"].items()
        for operation in methods.values()
        if "description" in operation
    ]
    texts = [*schemas, *operations, *((place, field["description"]) for place, _, field in described(app))]

    assert [found for found in texts if re.search(r"\b[Ii]ds?\b", re.sub("`[^`]*`", "", found[1]))] == []


def test_every_quantity_names_its_unit(app: FastAPI) -> None:
    numbers = [(place, name, field) for place, name, field in described(app) if _is_number(field)]

    without = [
        (place, name, field["description"])
        for place, name, field in numbers
        for pattern, unit in UNITS
        if re.search(pattern, name) and not re.search(f"^Number of|{unit}", field["description"], re.IGNORECASE)
    ]

    assert without == []


def test_every_optional_field_of_a_request_explains_its_default(app: FastAPI) -> None:
    """A default of null does not show its effect; the reference lists any other default."""
    document = app.openapi()
    bodies = [
        operation["requestBody"]["content"]
        for methods in document["paths"].values()
        for operation in methods.values()
        if "requestBody" in operation
    ]
    sent = set(_named_in(bodies))
    while more := {name for one in sent for name in _named_in(_schema(document, one))} - sent:
        sent |= more

    unexplained = [
        (name, field, meaning(schema, document))
        for name in sorted(sent)
        for field, schema in _schema(document, name).get("properties", {}).items()
        if field not in _schema(document, name).get("required", ()) and schema.get("default") is None
        if not re.search("null:|default:|omitted|ignored", meaning(schema, document), re.IGNORECASE)
        if "Omitted fields stay unchanged" not in _schema(document, name)["description"]
    ]

    assert unexplained == []


def _named_in(part: Any) -> list[str]:
    return re.findall(r"'#/components/schemas/(\w+)'", str(part))


def _schema(document: Json, name: str) -> Json:
    return document["components"]["schemas"][name]


def _says(name: str, field: Json) -> bool:
    """Return whether the description is a sentence with more content than the name."""
    text = field["description"]
    known = {*re.findall(r"\w+", name.lower().replace("_", " ")), *WITHOUT_CONTENT}
    return _is_sentence(text) and bool({*re.findall(r"[\w…-]+", text.lower())} - known)


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= MIN_WORDS and text.endswith(".")


def _is_number(schema: Json) -> bool:
    types = [one.get("type") for one in schema.get("anyOf", (schema,))]
    return "integer" in types or "number" in types
