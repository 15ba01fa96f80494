"""What an API key may do: scopes, each a resource and a verb. Pure.

api/auth/scopes.py says which route needs which scope.
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
"""They reach beyond a project: only an operator's key can hold them."""


def granted(scopes: Collection[str] | None, *, is_operator: bool) -> frozenset[str]:
    """What a key can do. `scopes` None: all that its kind can, and what is added to that later."""
    able = frozenset(SCOPES) if is_operator else frozenset(SCOPES) - OPERATORS
    return able if scopes is None else able & frozenset(scopes)
