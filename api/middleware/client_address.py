"""The network address of the client that sent a request.

The address is that of the connection, unless the peer is a trusted proxy (`LORRY_TRUSTED_PROXIES`). In that case
`X-Forwarded-For` determines the client. The header is ignored if it comes from any other peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope

Network = IPv4Network | IPv6Network
MAX_HOPS = 32
"""Maximum number of entries of `X-Forwarded-For` read, from the right. A longer chain of proxies is a mistake."""


def client_address(request: HTTPConnection) -> str | None:
    """Return the client's IP address as text, without a port. The gate resolves it once, before any route runs.

    Returns None for a connection without an address (a Unix socket).
    """
    return request.state.client_address


def resolve(scope: Scope, trusted: Sequence[Network]) -> str | None:
    """Return the right-most address of the chain that is not a trusted proxy.

    Each proxy appends the address of its own peer. So only entries to the right of the first untrusted address are
    reliable; the client may have invented those to its left. An entry that is not an address ends the search at the
    proxy that forwarded it.
    """
    peer: tuple[str, int] | None = scope.get("client")
    if peer is None:
        return None
    found = _parsed(peer[0])
    if found is None:  # a test client, or a Unix socket
        return peer[0]
    lines = Headers(scope=scope).getlist("x-forwarded-for")
    hops = ",".join(lines).rsplit(",", MAX_HOPS)[-MAX_HOPS:] if lines else []
    while _is_trusted(found, trusted) and hops:
        named = _parsed(hops.pop())
        if named is None:
            break
        found = named
    return str(found)


def _is_trusted(address: IPv4Address | IPv6Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted if network.version == address.version)


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """Parse `10.0.0.1`, `10.0.0.1:4711`, `2001:db8::1` or `[2001:db8::1]:4711`, and unwrap an IPv4-mapped address."""
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
