"""The OpenAPI document: the framework's, less the refusals that are never sent in its own shape, with `x-scopes`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.scopes import NEEDED


class Api(FastAPI):
    """Every refusal is an ErrorResponse with a status of its own; 422 is not used."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _finished(
                get_openapi(
                    title=self.title,
                    version=self.version,
                    description=self.description,
                    tags=self.openapi_tags,
                    routes=self.routes,
                )
            )
        return self.openapi_schema


def _finished(document: dict[str, Any]) -> dict[str, Any]:
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if needed := NEEDED.get(operation["operationId"]):
                operation["x-scopes"] = list(needed)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
