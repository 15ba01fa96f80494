"""One-time links with which a browser signs in to the dashboard."""

from __future__ import annotations

from typing import Any

from lorry.resources.resource import Resource


class SignInLinks(Resource):
    def create(self) -> dict[str, Any]:
        """Create a link. `url` works once, until `expires_at`."""
        return self._transport.request("POST", "sign_in_links")

    def identity(self) -> dict[str, Any]:
        """Return the name, project, scopes and rights of this client's API key."""
        return self._transport.get("browser_session")
