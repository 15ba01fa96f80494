"""The REST API reference, from the OpenAPI document: an index, one page per resource (tag), and one of all schemas."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

from pydantic import SecretStr

from api.app import TAGS, create_app
from api.settings import ApiSettings
from catalog.db.database import Database
from catalog.settings import Settings
from tools.json_schema import Json, cell, references, type_of

METHODS = ("get", "post", "put", "patch", "delete")
LIST = re.compile(r"ListPage_(\w+)_")
LIST_EXAMPLE = "ListPage_FileObject_"
INTRODUCTION = """\
# REST API

The API server returns this description as `GET /openapi.json`. Send the API key as `Authorization: Bearer
lorry_key-…`. Times are in Unix seconds. All [errors](errors.md) have one shape:
[ErrorResponse](api/schemas.md#errorresponse).
"""


@cache
def openapi() -> Json:
    """Return the OpenAPI document of the API server with default settings."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/lorry.db"
        Database(url).migrate()
        settings = Settings(data_dir=Path(folder), database_url=SecretStr(url), pepper=SecretStr("0" * 64))
        return create_app(settings, ApiSettings()).openapi()


def pages() -> dict[str, Callable[[], str]]:
    """Return the function that writes each page, by the page's path."""
    resources = {f"reference/{_path(tag['name'])}": partial(_resource, **tag) for tag in TAGS}
    return {"reference/api.md": _index, "reference/api/schemas.md": _schema_page, **resources}


def meaning(schema: Json, document: Json) -> str:
    """Return the description of a field: its own, that of its only type other than null, or that of its schema."""
    if text := schema.get("description"):
        return text
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]].get("description", "")
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    return meaning(kinds[0], document) if len(kinds) == 1 else ""


def _index() -> str:
    parts = [INTRODUCTION]
    for tag in TAGS:
        title, path = tag["name"].capitalize(), _path(tag["name"])
        parts += [f"## {title}", "", f"[{title}]({path}): {tag['description']}", ""]
        parts += ["| Operation | Purpose |", "|---|---|"]
        for heading, operation in _operations(tag["name"]):
            anchor = re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")
            parts.append(f"| [`{heading}`]({path}#{anchor}) | {_first_sentence(_purpose(operation))} |")
        parts.append("")
    return "\n".join(parts)


def _resource(name: str, description: str) -> str:
    parts = [f"# {name.capitalize()}", "", f"{description} [All resources](../api.md).", ""]
    for heading, operation in _operations(name):
        parts += [f"## {heading}", "", _purpose(operation), "", *_parameters(operation)]
        for label, kind, schema in _contents(operation):
            parts += [f"{label}: `{kind}`, {type_of(schema, _link)}.", ""]
            if "properties" in schema:
                parts += _table(schema, with_default=True)
    return "\n".join(parts)


def _schema_page() -> str:
    schemas = openapi()["components"]["schemas"]
    sent = set(references([operation.get("requestBody") for tag in TAGS for _, operation in _operations(tag["name"])]))
    while more := {inner for name in sent for inner in references(schemas[name])} - sent:
        sent |= more
    parts = ["# Schemas of the REST API", ""]
    for name, schema in sorted(schemas.items()):
        if name == LIST_EXAMPLE or not LIST.fullmatch(name):
            parts += [f"## {'ListPage' if name == LIST_EXAMPLE else name}", "", cell(schema["description"]), ""]
            # The defaults of responses don't matter to a reader.
            parts += _table(schema, with_default=name in sent) if schema.get("properties") else []
    return "\n".join(parts)


def _operations(tag: str) -> Iterator[tuple[str, Json]]:
    """Yield (heading, operation) of the resource."""
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            if method in METHODS and operation["tags"] == [tag]:
                yield f"{method.upper()} {path}", operation


def _contents(operation: Json) -> Iterator[tuple[str, str, Json]]:
    """Yield (label, media type, schema) of the request body and the successful responses."""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield "Request body", kind, content["schema"]
    for status, response in operation["responses"].items():
        for kind, content in response.get("content", {}).items() if status.startswith("2") else ():
            yield f"Response {status}", kind, content.get("schema", {})


def _parameters(operation: Json) -> Iterator[str]:
    if parameters := operation.get("parameters", []):
        yield from ("| Parameter | In | Type | Meaning |", "|---|---|---|---|")
        for one in parameters:
            schema = {**one["schema"], "description": one.get("description") or meaning(one["schema"], openapi())}
            text = _meaning(schema, with_default=True)
            yield f"| `{one['name']}` | {one['in']} | {type_of(schema, _link)} | {text} |"
        yield ""


def _table(schema: Json, *, with_default: bool) -> Iterator[str]:
    yield from ("| Field | Type | Meaning |", "|---|---|---|")
    for name, field in schema["properties"].items():
        required = " (required)" if with_default and name in schema.get("required", []) else ""
        yield f"| `{name}`{required} | {type_of(field, _link)} | {_meaning(field, with_default=with_default)} |"
    yield ""


def _meaning(schema: Json, *, with_default: bool) -> str:
    default = schema.get("default")
    text = schema.get("description") or _first_sentence(meaning(schema, openapi()))
    if with_default and default not in (None, {}, []) and "efault" not in text:
        text = f"{text} Default: {json.dumps(default)}."
    return cell(text)


def _link(name: str) -> str:
    """Return a link to the section of a schema, for the type of a field."""
    if listed := LIST.fullmatch(name):
        return f"[page](schemas.md#listpage) of {_link(listed[1])}"
    return f"[{name}](schemas.md#{name.lower()})"


def _path(tag: str) -> str:
    return f"api/{tag.replace(' ', '-')}.md"


def _purpose(operation: Json) -> str:
    return operation.get("description") or operation["summary"]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", cell(text), maxsplit=1)[0]
