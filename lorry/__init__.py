"""Lorry's client: `from lorry import Lorry`, and the command `lorry`.

Speaks to a service over HTTP only and imports nothing of the service's own packages.
"""

from __future__ import annotations

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
    WaitTimeout,
)
from lorry.models import Adapter, File, Job, JobEvent, JobUpdate, Model

__version__ = "0.1.0"

__all__ = [
    "APIError",
    "Adapter",
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
    "PermissionDenied",
    "RateLimited",
    "ServerFailed",
    "WaitTimeout",
]
