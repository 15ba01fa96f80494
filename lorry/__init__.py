"""Lorry's Python client: `from lorry import Lorry`, and the command `lorry`.

It communicates with a service over HTTP only, and imports none of the service's packages. Names are imported on first
use, so that a command starts quickly and Ctrl-C never interrupts a half-finished import.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorry.client import Lorry
    from lorry.errors import (
        APIError,
        AuthenticationFailed,
        BadDownload,
        Conflict,
        ConnectionFailed,
        InvalidRequest,
        LorryError,
        NotConfigured,
        NotFound,
        PermissionDenied,
        RateLimited,
        ServerFailed,
        ServiceNotVerified,
        WaitTimeout,
    )
    from lorry.models import (
        Adapter,
        ApiKey,
        AuditEvent,
        File,
        Job,
        JobEvent,
        Model,
        Organization,
        Project,
        Sweep,
        Trial,
        WebhookDelivery,
        WebhookEndpoint,
    )
    from lorry.resources.follow import JobUpdate
    from lorry.transport.retries import RetryPolicy

__version__ = "0.1.0"

__all__ = [
    "APIError",
    "Adapter",
    "ApiKey",
    "AuditEvent",
    "AuthenticationFailed",
    "BadDownload",
    "Conflict",
    "ConnectionFailed",
    "File",
    "InvalidRequest",
    "Job",
    "JobEvent",
    "JobUpdate",
    "Lorry",
    "LorryError",
    "Model",
    "NotConfigured",
    "NotFound",
    "Organization",
    "PermissionDenied",
    "Project",
    "RateLimited",
    "RetryPolicy",
    "ServerFailed",
    "ServiceNotVerified",
    "Sweep",
    "Trial",
    "WaitTimeout",
    "WebhookDelivery",
    "WebhookEndpoint",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in ("errors", "models", "resources.follow", "client", "transport.retries"):
            found = vars(import_module(f"{__name__}.{home}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")  # the import also sets the attribute of this module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
