"""Which URLs and addresses a webhook may have. Pure: host names are not resolved here.

`ipaddress.is_global` is true for some addresses that lead to internal networks, so blocked networks are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from urllib.parse import urlsplit

from catalog.errors import InvalidRequest

MAX_URL = 2048
LOWEST_FREE_PORT = 1024
PORTS = {"http": 80, "https": 443}
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
SHUT = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's agent, reachable from every virtual machine there
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
"""Blocked networks. 2001::/23 contains Teredo, and 2002::/16 is 6to4; both embed an IPv4 address."""
GLOBAL_IPV6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})")
PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """Targets that an operator allows in addition to https at public addresses."""

    networks: tuple[Network, ...] = ()
    allow_http: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookTarget:
    """The parts of a URL that a request needs."""

    scheme: str
    host: str
    """A host name, or an IP address without brackets."""
    port: int
    path: str
    """The path with the query."""

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return shown if self.port == PORTS[self.scheme] else f"{shown}:{self.port}"


OPENED = "Use a public address, or ask the operator to add its network to LORRY_WEBHOOK_ALLOWED_NETWORKS."


def target_of(url: str, rules: Rules) -> WebhookTarget:
    """Return the target of a URL. Raises InvalidRequest for an invalid URL, and for one with a blocked IP address."""
    if len(url) > MAX_URL:
        raise _bad(f"'url' has {len(url):,} characters, but the maximum is {MAX_URL:,}", remedy="Use a shorter URL.")
    if not PRINTABLE.fullmatch(url) or "\\" in url:
        raise _bad(
            "'url' is empty, or contains a space, a backslash or a character that is not printable ASCII",
            remedy="Percent-encode such characters, as in https://example.com/my%20hook.",
        )
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
        literal = ip_address(host) if ":" in host else _ipv4(host)
    except ValueError:
        raise _bad("'url' is not a valid URL") from None
    if parts.scheme not in PORTS or (parts.scheme == "http" and not rules.allow_http):
        raise _bad(
            "'url' must start with https://",
            remedy="Use an https:// URL, or ask the operator to allow HTTP with LORRY_WEBHOOK_ALLOW_HTTP=true.",
        )
    if "@" in parts.netloc:
        raise _bad(
            "'url' can't contain a user name or a password",
            remedy="Remove it. To authenticate messages, verify their webhook signature instead.",
        )
    if "#" in url:
        raise _bad("'url' can't contain a fragment", remedy="Remove the '#' and the text after it.")
    if literal is None and not HOST.fullmatch(host):
        raise _bad(
            "'url' does not have a valid host name",
            remedy="Use a host name such as hooks.example.com. If it has non-ASCII characters, use its Punycode form "
            "(xn--…).",
        )
    port = PORTS[parts.scheme] if port is None else port
    if port not in PORTS.values() and port < LOWEST_FREE_PORT:
        raise _bad(
            f"'url' uses port {port}, which is not allowed",
            remedy=f"Use port 80 or 443, or a port from {LOWEST_FREE_PORT}.",
        )
    if literal is not None and (blocked := blocked_address(literal, rules)):
        raise _bad(
            f"'url' points to {blocked}, which is not a public IP address",
            code="webhook_address_not_allowed",
            remedy=OPENED,
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebhookTarget(scheme=parts.scheme, host=host, port=port, path=path)


def blocked_address(address: Address, rules: Rules) -> Address | None:
    """Return the address that requests to this address reach and that is blocked, or None if it is allowed."""
    inner = _carried(address)
    if inner is not None:
        return blocked_address(inner, rules)
    if any(address in network for network in rules.networks if network.version == address.version):
        return None
    is_public = address.is_global and not address.is_multicast and not address.is_reserved
    if isinstance(address, IPv6Address):
        is_public = is_public and address in GLOBAL_IPV6
    if is_public and not any(address in network for network in SHUT if network.version == address.version):
        return None
    return address


def networks_of(text: str) -> tuple[Network, ...]:
    """Return the networks of a setting, which are separated by commas. Raises ValueError."""
    return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())


def _carried(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 address embeds and requests reach, or None."""
    if isinstance(address, IPv4Address):
        return None
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def _ipv4(host: str) -> IPv4Address | None:
    try:
        return IPv4Address(host)
    except ValueError:
        return None


def _bad(
    problem: str, *, code: str = "invalid_webhook_url", remedy: str = "Use a URL such as https://example.com/hooks."
):
    return InvalidRequest(f"{problem}.", code=code, remedy=remedy, param="url")
