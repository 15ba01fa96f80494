"""The REST API reference, from the OpenAPI document: an index, and one page for each tag."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def meaning(schema: Json, document: Json) -> str:
    """Return the description of a field: its own, that of its only type other than null, or that of its schema."""
    if text := schema.get("description"):
        return text
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]].get("description", "")
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    return meaning(kinds[0], document) if len(kinds) == 1 else ""
