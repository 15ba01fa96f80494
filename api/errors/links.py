"""Links to the error reference, `dashboard/errors.html`, which `make docs` generates and the API server serves."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_service_url: ContextVar[str | None] = ContextVar("service_url", default=None)


@contextmanager
def serving(url: str | None) -> Generator[None]:
    """Set the URL under which the client of the current request reaches the service."""
    token = _service_url.set(url)
    try:
        yield
    finally:
        _service_url.reset(token)


def doc_url(code: str) -> str:
    """Return the URL of the code's entry. Outside a request, the URL is relative to the service."""
    return f"{(_service_url.get() or '').rstrip('/')}/dashboard/errors.html#{code}"
