"""Decides which URLs and addresses a webhook may have. Pure: host names are not resolved here.

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
from urllib.parse import SplitResult, urlsplit

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
FORBIDDEN = re.compile(r"[^\x21-\x7e]|\\")


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


OPENED = (
    "Use a public address, or ask the operator to add the network of this address to LORRY_WEBHOOK_ALLOWED_NETWORKS."
)


def target_of(url: str, rules: Rules) -> WebhookTarget:
    """Return the target of a URL. Raises InvalidRequest for an invalid URL, and for one with a blocked IP address."""
    _check_characters(url)
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        literal = ip_address(host) if ":" in host else _ipv4(host)
    except ValueError:
        raise InvalidRequest("webhook_ipv6_invalid", param="url") from None
    _check_parts(url, parts, rules)
    if literal is None and not HOST.fullmatch(host):
        if host:
            raise InvalidRequest("webhook_host_invalid", host=host, param="url")
        raise InvalidRequest("webhook_host_missing", param="url")
    port = _port_of(parts)
    if literal is not None and (blocked := blocked_address(literal, rules)):
        raise InvalidRequest("webhook_address_not_allowed", blocked=str(blocked), param="url")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return WebhookTarget(scheme=parts.scheme, host=host, port=port, path=path)


def _check_characters(url: str) -> None:
    if not url:
        raise InvalidRequest("webhook_url_empty", param="url")
    if len(url) > MAX_URL:
        raise InvalidRequest("webhook_url_too_long", num_url=len(url), max_url=MAX_URL, param="url")
    if (found := FORBIDDEN.search(url)) is None:
        return
    is_in_host = not any(mark in url[: found.start()].partition("://")[2] for mark in "/?#")
    raise InvalidRequest(
        "webhook_host_character" if is_in_host else "webhook_url_character",
        found=found[0],
        start=found.start() + 1,
        param="url",
    )


def _check_parts(url: str, parts: SplitResult, rules: Rules) -> None:
    if parts.scheme == "http" and not rules.allow_http:
        raise InvalidRequest("webhook_url_is_http", param="url")
    if parts.scheme not in PORTS:
        has_scheme = url.lower().startswith(f"{parts.scheme}://")
        if has_scheme:
            if rules.allow_http:
                raise InvalidRequest("webhook_scheme_not_http_or_https", scheme=parts.scheme, param="url")
            raise InvalidRequest("webhook_scheme_not_https", scheme=parts.scheme, param="url")
        if rules.allow_http:
            raise InvalidRequest("webhook_url_without_http_or_https", param="url")
        raise InvalidRequest("webhook_url_without_https", param="url")
    if "@" in parts.netloc:
        raise InvalidRequest("webhook_url_with_password", param="url")
    if "#" in url:
        raise InvalidRequest("webhook_url_with_fragment", index=url.index("#") + 1, param="url")


def _port_of(parts: SplitResult) -> int:
    try:
        port = PORTS[parts.scheme] if parts.port is None else parts.port
    except ValueError:
        named = parts.netloc.rpartition(":")[2]
        raise InvalidRequest(
            "webhook_port_invalid", named=named, lowest_free_port=LOWEST_FREE_PORT, param="url"
        ) from None
    if port not in PORTS.values() and port < LOWEST_FREE_PORT:
        raise InvalidRequest("webhook_port_not_allowed", port=port, lowest_free_port=LOWEST_FREE_PORT, param="url")
    return port


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
