"""Typed responses for serving endpoints and deployments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorry.models.jobs import View


@dataclass(frozen=True, kw_only=True)
class ServingEndpoint(View):
    """An inference server that loads adapters at run time."""

    id: str = ""
    name: str = ""
    kind: str = ""
    base_model: str = ""
    base_digest: str = ""
    url: str | None = None
    adapter_folder: str | None = None
    last_error: str | None = None
    served_model: str | None = None
    """The server's name of the base model. These four are shown only to operators."""
    has_api_key: bool = False
    max_rank: int = 0
    """Highest rank that the server loads."""
    state: str = ""
    """pending, ready, unreachable, rejected or failed."""
    verification: dict[str, Any] | None = None
    """Comparison of the base model's answer with that of the built-in engine."""
    checked_at: int | None = None
    created_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Deployment(View):
    """An adapter on a serving endpoint."""

    id: str = ""
    adapter_id: str = ""
    adapter: str = ""
    endpoint_id: str = ""
    endpoint: str = ""
    state: str = ""
    """pending, ready, failed or removing."""
    last_error: str | None = None
    verification: dict[str, Any] | None = None
    """Comparison of its answer with that of the built-in engine: passed, max_diff, tolerance, distinguishes, …"""
    created_at: int = 0
    updated_at: int = 0
