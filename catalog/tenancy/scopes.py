"""Scopes of API keys. Each is a resource and a verb. Pure: no input or output.

api/auth/scopes.py defines which scope each route needs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

Scope = Literal[
    "files:read",
    "files:write",
    "jobs:read",
    "jobs:write",
    "adapters:read",
    "adapters:write",
    "keys:read",
    "keys:write",
    "audit:read",
    "webhooks:read",
    "webhooks:write",
    "usage:read",
    "models:answer",
    "models:write",
    "projects:write",
    "organizations:write",
    "permissions:read",
    "permissions:write",
    "workers:write",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)
OPERATORS: frozenset[Scope] = frozenset(
    {
        "models:write",
        "projects:write",
        "organizations:write",
        "permissions:read",
        "permissions:write",
        "workers:write",
    }
)
"""Scopes whose effect reaches beyond a project. Only an operator key can have them."""


def granted(scopes: Collection[str] | None, *, is_operator: bool) -> frozenset[str]:
    """Return the effective scopes of a key. scopes: None: all that its kind can have, including future ones."""
    able = frozenset(SCOPES) if is_operator else frozenset(SCOPES) - OPERATORS
    return able if scopes is None else able & frozenset(scopes)
