"""What goes over the wire: one module per resource, each with its models and the function that shapes a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def changes_schema(example: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """`json_schema_extra` of a body whose fields stay as they are if left out: none of them has a default then."""

    def extend(schema: dict[str, Any]) -> None:
        for field in schema["properties"].values():
            field.pop("default", None)
        schema["example"] = example

    return extend
