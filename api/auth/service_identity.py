"""Proves the identity of the API server to a local client before the client sends an API key.

The proof is an HMAC over the client's nonce and over the address and port at which the server accepted the connection.
The client therefore rejects a proof that another process relays from another port. The client's side is in
lorry/transport/service_identity.py.
"""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import IPv6Address, ip_address

NONCE_PATTERN = r"^[0-9a-f]{64}$"


def secret_of(pepper: bytes) -> str:
    """Return the installation's identity secret, 64 hexadecimal digits. It reveals nothing about the pepper."""
    return hmac.new(pepper, b"lorry service identity secret", hashlib.sha256).hexdigest()


def proof(pepper: bytes, *, nonce: str, host: str, port: int) -> str:
    """Return the HMAC for a connection that was accepted at `host` and `port`, as 64 hexadecimal digits."""
    text = f"lorry service identity\n{nonce}\n{_canonical(host)}\n{port}"
    return hmac.new(secret_of(pepper).encode("ascii"), text.encode(), hashlib.sha256).hexdigest()


def _canonical(host: str) -> str:
    """Return the canonical spelling of an IP address. An IPv4-mapped IPv6 address becomes the IPv4 address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str((address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address)
