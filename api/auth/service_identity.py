"""Proof of identity that the API server gives before a local client sends it an API key: an HMAC over the client's
nonce and over the address and port at which the server accepted this very connection. So a process that relays the
nonce from another port gets a proof that the client rejects. lorry/transport/service_identity.py is the client's side.
"""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import IPv6Address, ip_address

NONCE_PATTERN = r"^[0-9a-f]{64}$"


def secret_of(pepper: bytes) -> str:
    """The installation's identity secret, 64 hexadecimal digits. It reveals nothing about the pepper."""
    return hmac.new(pepper, b"lorry service identity secret", hashlib.sha256).hexdigest()


def proof(pepper: bytes, *, nonce: str, host: str, port: int) -> str:
    """The HMAC for a connection that was accepted at `host` and `port`, as 64 hexadecimal digits."""
    text = f"lorry service identity\n{nonce}\n{_canonical(host)}\n{port}"
    return hmac.new(secret_of(pepper).encode("ascii"), text.encode(), hashlib.sha256).hexdigest()


def _canonical(host: str) -> str:
    """One spelling of each IP address; an IPv4 address that a dual-stack socket shows as IPv6 is that IPv4 address."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return str((address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address)
