"""The OpenAPI document: the one of FastAPI without its 422 responses, which are never sent, plus `x-scopes`, the
description of `object`, and the constraint that no path or query contains NUL."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from api.auth.scopes import NEEDED
from catalog.spec.model_fields import WITHOUT_NUL


class Api(FastAPI):
    """A FastAPI app whose errors are ErrorResponses with a status of their own. It never sends 422.

    Building the document takes about a second of CPU time. It is built when a client first requests it. Requests that
    need information about routes read the routes, not the document.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, openapi_url=None)  # FastAPI's own route would block the event loop while it builds
        self.add_route("/openapi.json", self._answer, include_in_schema=False)
        self._methods: dict[str, set[str]] = {}
        self._making_document = threading.Lock()

    @property
    def methods(self) -> Mapping[str, set[str]]:
        """The methods of each path template in the document."""
        return self._methods

    def include_router(self, router: APIRouter, **given: Any) -> None:
        super().include_router(router, **given)
        for route in router.routes:
            if isinstance(route, APIRoute) and route.include_in_schema:
                self._methods.setdefault(route.path_format, set()).update(route.methods or ())

    def openapi(self) -> dict[str, Any]:
        with self._making_document:
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

    async def _answer(self, _request: Request) -> Response:
        return Response(await run_in_threadpool(self._as_json), media_type="application/json")

    def _as_json(self) -> bytes:
        return json.dumps(self.openapi(), ensure_ascii=False, separators=(",", ":")).encode()


def _finished(document: dict[str, Any]) -> dict[str, Any]:
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            for parameter in operation.get("parameters", ()):
                if parameter["in"] in ("path", "query"):
                    _forbid_nul(parameter["schema"])
            if needed := NEEDED.get(operation["operationId"]):
                operation["x-scopes"] = list(needed)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for schema in schemas.values():
        if (kind := schema.get("properties", {}).get("object")) is not None:
            kind.setdefault("description", "Type of the object.")
    return document


def _forbid_nul(schema: dict[str, Any]) -> None:
    """Exclude NUL from strings: the request gate rejects every path or query that contains it."""
    for inner in (*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())):
        _forbid_nul(inner)
    if schema.get("type") == "string" and schema.keys().isdisjoint(("pattern", "enum", "const")):
        schema |= WITHOUT_NUL
