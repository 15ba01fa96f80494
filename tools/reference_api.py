"""The REST API reference, from the OpenAPI document: an index, and one page for each resource (tag)."""

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
INDEX = "reference/api.md"
PAGES = {tag["name"]: f"reference/api/{tag['name'].replace(' ', '-')}.md" for tag in TAGS}


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
    return {INDEX: _index, **{path: partial(_page, tag) for tag, path in PAGES.items()}}


def meaning(schema: Json, document: Json) -> str:
    """Return the description of a field: its own, that of its only type other than null, or that of its schema."""
    if text := schema.get("description"):
        return text
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]].get("description", "")
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    return meaning(kinds[0], document) if len(kinds) == 1 else ""


def _index() -> str:
    schemas = _schemas()
    parts = [
        "# REST API",
        "",
        "The API server returns this description as `GET /openapi.json`. Send the API key as `Authorization: Bearer "
        "lorry_key-…`. Times are in Unix seconds. All [errors](errors.md) have one shape: [ErrorResponse]"
        "(#errorresponse).",
    ]
    for tag in TAGS:
        page = Path(PAGES[tag["name"]])
        parts += [
            "",
            f"## {_title(tag['name'])}",
            "",
            f"[{_title(tag['name'])}](api/{page.name}): {tag['description']}",
        ]
        parts += ["", "| Operation | Purpose |", "|---|---|"]
        for heading, operation in _operations(tag["name"]):
            anchor = re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-")
            parts.append(f"| [`{heading}`](api/{page.name}#{anchor}) | {_first_sentence(_purpose(operation))} |")
    parts += ["", "## List pages", "", *_fields("ListPage", schemas["ListPage_FileObject_"], page=INDEX, level=3)]
    parts += ["## Errors", ""]
    for name in sorted(schemas.keys() - _pages_of_schemas().keys()):
        if not LIST.fullmatch(name):
            parts += _fields(name, schemas[name], page=INDEX, level=3)
    return "\n".join(parts)


def _page(tag: str) -> str:
    page = PAGES[tag]
    description = next(one["description"] for one in TAGS if one["name"] == tag)
    parts = [f"# {_title(tag)}", "", f"{description} [All resources](../api.md).", ""]
    for heading, operation in _operations(tag):
        parts += [f"## {heading}", "", _purpose(operation), ""]
        parts += _parameters(operation, page=page)
        parts += _bodies(operation, page=page)
    names = sorted(name for name, of in _pages_of_schemas().items() if of == page)
    if names:
        parts += ["## Schemas", ""]
    for name in names:
        parts += _fields(name, _schemas()[name], page=page, level=3)
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


@cache
def _pages_of_schemas() -> dict[str, str]:
    """Return the page of each schema: that of the first resource which uses it. Errors are not in it."""
    found: dict[str, str] = {}
    for tag, page in PAGES.items():
        named = set(references([schema for _, one in _operations(tag) for _, _, schema in _contents(one)]))
        for name in _with_inner(named):
            if not LIST.fullmatch(name):
                found.setdefault(name, page)
    return found


@cache
def _sent() -> set[str]:
    """Return the schemas of request bodies, whose defaults matter to a reader."""
    bodies = [operation.get("requestBody") for tag in PAGES for _, operation in _operations(tag)]
    return _with_inner(set(references(bodies)))


def _with_inner(names: set[str]) -> set[str]:
    while more := {inner for name in names for inner in references(_schemas()[name])} - names:
        names |= more
    return names


def _schemas() -> dict[str, Json]:
    return openapi()["components"]["schemas"]


def _parameters(operation: Json, *, page: str) -> Iterator[str]:
    parameters = operation.get("parameters", [])
    if parameters:
        yield from ("| Parameter | In | Type | Meaning |", "|---|---|---|---|")
        for one in parameters:
            schema = {**one["schema"], "description": one.get("description") or meaning(one["schema"], openapi())}
            yield f"| `{one['name']}` | {one['in']} | {_type(schema, page)} | {_meaning(schema, with_default=True)} |"
        yield ""


def _bodies(operation: Json, *, page: str) -> Iterator[str]:
    for label, kind, schema in _contents(operation):
        yield from (f"{label}: `{kind}`, {_type(schema, page)}.", "")
        if "properties" in schema:
            yield from _table(schema, page=page, with_default=True)


def _fields(name: str, schema: Json, *, page: str, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {name}", "", cell(schema["description"]), "")
    if schema.get("properties"):
        yield from _table(schema, page=page, with_default=name in _sent())


def _table(schema: Json, *, page: str, with_default: bool) -> Iterator[str]:
    yield from ("| Field | Type | Meaning |", "|---|---|---|")
    for name, field in schema["properties"].items():
        required = " (required)" if with_default and name in schema.get("required", []) else ""
        yield f"| `{name}`{required} | {_type(field, page)} | {_meaning(field, with_default=with_default)} |"
    yield ""


def _meaning(schema: Json, *, with_default: bool) -> str:
    default = schema.get("default")
    text = schema.get("description") or _first_sentence(meaning(schema, openapi()))
    if with_default and default not in (None, {}, []) and "efault" not in text:
        text = f"{text} Default: {json.dumps(default)}."
    return cell(text)


def _type(schema: Json, page: str) -> str:
    """Return a schema's type as Markdown; references become links to its section."""
    return type_of(schema, partial(_link, page=page))


def _link(name: str, *, page: str) -> str:
    if listed := LIST.fullmatch(name):
        return f"[page](../api.md#list-pages) of {_link(listed[1], page=page)}"
    target = _pages_of_schemas().get(name, INDEX)
    folder = "" if page != INDEX else "api/"
    path = "" if target == page else "../api.md" if target == INDEX else f"{folder}{Path(target).name}"
    return f"[{name}]({path}#{name.lower()})"


def _purpose(operation: Json) -> str:
    return operation.get("description") or operation["summary"]


def _title(tag: str) -> str:
    return tag[0].upper() + tag[1:]


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", cell(text), maxsplit=1)[0]
