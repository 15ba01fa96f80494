"""Organizations."""

from __future__ import annotations

from collections.abc import Iterator

from lorry.models import Organization
from lorry.resources.resource import Resource

_PATH = "organizations"


class Organizations(Resource):
    def create(self, name: str) -> Organization:
        """Create an organization. Requires an operator key."""
        return self._post(Organization, _PATH, body={"name": name})

    def list(self) -> Iterator[Organization]:
        """Yield the key's organization, or all organizations with an operator key."""
        return self._list(Organization, _PATH)

    def get(self, organization: str) -> Organization:
        """Return an organization by id or name."""
        return self._get(Organization, _PATH, organization)

    def rename(self, organization: str, name: str) -> Organization:
        """Rename an organization. Requires an operator key."""
        return self._post(Organization, _PATH, organization, body={"name": name})
