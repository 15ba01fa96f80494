"""Request and response schemas: one module per resource, with its models and the functions that build responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def changes_schema(example: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return `json_schema_extra` for a request body in which omitted fields stay unchanged: no field has a default."""

    def extend(schema: dict[str, Any]) -> None:
        for field in schema["properties"].values():
            field.pop("default", None)
        schema["example"] = example

    return extend
