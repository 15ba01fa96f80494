"""The headers that every answer carries: what a browser may do with it."""

from __future__ import annotations

DASHBOARD_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "font-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
DATA_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Nothing of the API is a page."""


def security_headers(path: str) -> dict[str, str]:
    is_page = path.startswith("/dashboard")
    headers = {
        "content-security-policy": DASHBOARD_POLICY if is_page else DATA_POLICY,
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
    }
    if not is_page:
        headers["cache-control"] = "no-store"
    return headers
