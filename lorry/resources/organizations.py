"""Organizations."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

from lorry.models import Organization
from lorry.resources import pages
from lorry.transport.http import Transport


class Organizations:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str) -> Organization:
        """Create an organization. Requires an operator key."""
        return Organization.of(self._transport.request("POST", "organizations", body={"name": name}))

    def list(self) -> Iterator[Organization]:
        """Yield the key's organization, or all organizations with an operator key."""
        return (Organization.of(item) for item in pages.follow(self._transport, "organizations"))

    def get(self, organization: str) -> Organization:
        """Return an organization by id or name."""
        return Organization.of(self._transport.get(_path(organization)))

    def rename(self, organization: str, name: str) -> Organization:
        """Rename an organization. Requires an operator key."""
        return Organization.of(self._transport.request("POST", _path(organization), body={"name": name}))


def _path(organization: str) -> str:
    return f"organizations/{quote(organization, safe='')}"
