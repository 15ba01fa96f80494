"""By which names the api may be addressed. A page that rebinds its own name to our address is refused.

An IP address in the Host header can't be rebound, so where the api listens on every interface any is good.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HostPolicy:
    names: frozenset[str]
    any_address: bool
    """The api listens on every interface."""

    def admits(self, host_header: str) -> bool:
        name = host_name(host_header)
        return name in self.names or (self.any_address and _is_address(name))


def host_policy(*, bound_host: str, named: list[str]) -> HostPolicy:
    """Loopback, the address that is listened on, this machine's name if that is not loopback, and `named`."""
    bound = bound_host.strip("[]").lower()
    any_address = bound in ("0.0.0.0", "::", "")  # noqa: S104  (compared, not bound)
    names = LOOPBACK_NAMES | {bound} | set(named)
    if bound not in LOOPBACK_NAMES:
        names |= {socket.gethostname().lower()}
    return HostPolicy(names=frozenset(names - {""}), any_address=any_address)


def host_name(host_header: str) -> str:
    """The name in a Host header or an origin's authority, without port and brackets."""
    text = host_header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text


def is_loopback(address: str) -> bool:
    return address == "localhost" or (_is_address(address) and ipaddress.ip_address(address).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
