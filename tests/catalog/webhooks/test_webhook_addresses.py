"""Allowed and blocked webhook addresses: internal addresses are blocked in each of their forms."""

from __future__ import annotations

import re
from ipaddress import ip_address

import pytest

from catalog.errors import InvalidRequest
from catalog.webhooks.url_policy import Rules, blocked_address, networks_of, target_of

INSIDE = """0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.8.8.8 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.192 192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.9 224.0.0.1 239.255.255.250 240.0.0.1
255.255.255.255 168.63.129.16 :: ::1 ::7f00:1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 64:ff9b::7f00:1
64:ff9b:1::a00:1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 2002:a9fe:a9fe:: 2002:7f00:1::
2002:808:808:: 3fff::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1"""
OUTSIDE = "8.8.8.8 1.1.1.1 172.32.0.1 192.0.1.1 223.255.255.255 2606:4700::1111 64:ff9b::808:808 ::ffff:8.8.8.8"


@pytest.mark.parametrize("address", INSIDE.split())
def test_private_address_is_blocked(address: str) -> None:
    assert blocked_address(ip_address(address), Rules()) is not None


@pytest.mark.parametrize("address", OUTSIDE.split())
def test_public_address_is_allowed(address: str) -> None:
    assert blocked_address(ip_address(address), Rules()) is None


def test_operator_can_allow_a_network_in_each_of_its_forms() -> None:
    rules = Rules(networks=networks_of("127.0.0.0/8, fd00::/8,10.2.0.0/16"))

    opened = ["127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a02:1", "fd00::1", "10.2.3.4"]
    assert [blocked_address(ip_address(address), rules) for address in opened] == [None] * 5
    assert blocked_address(ip_address("10.3.0.1"), rules)
    assert blocked_address(ip_address("::1"), rules)
    assert networks_of("") == ()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("", "'url' is empty"),
        ("ftp://example.com/", "starts with ftp://, but must start with https://"),
        ("http://example.com/", "starts with http://, but must start with https://"),
        ("file:///etc/passwd", "must start with https://"),
        ("example.com/hooks", "'url' must start with https://"),
        ("localhost:8000/hooks", "'url' must start with https://"),
        ("https://user:word@example.com/", "a user name or a password"),
        ("https://example.com@10.0.0.1/", "a user name or a password"),
        ("https://example.com/#part", "contains a fragment ('#' at character 21)"),
        ("https:///hooks", "no host name"),
        ("https://example$.com/", "is 'example$.com', which is not valid"),
        ("https://exa mple.com/", "contains ' ' at character 12"),
        ("https://example.com/\r\nHost: inside", r"contains '\r' at character 21"),
        ("https://ex\u00e4mple.com/", "contains '\u00e4' at character 11"),
        ("https://example.com\\@10.0.0.1/", "at character 20"),
        ("https://example.com:22/", "uses port 22"),
        ("https://example.com:0/", "uses port 0"),
        ("https://example.com:99999/", "is not a number from 0 to 65535"),
        ("https://example.com:http/", "is 'http', which is not a number from 0 to 65535"),
        ("https://[::1/", "not a valid IPv6 address"),
        ("https://127.0.0.1/", "127.0.0.1, which is not a public"),
        ("https://[::ffff:127.0.0.1]/", "127.0.0.1, which is not a public"),
        ("https://" + "a" * 3000, "the maximum is 2,048"),
    ],
)
def test_invalid_webhook_url_is_rejected_with_the_reason(url: str, what: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(what)) as refused:
        target_of(url, Rules())

    assert refused.value.remedy
    assert ("the network of this address" in refused.value.remedy) == ("not a public" in what)
    assert refused.value.param == "url"
    assert "word" not in refused.value.sentence().replace("password", "")


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("https://ex\u00e4mple.com/", "Punycode"),
        ("https://example.com/my hook", "percent-encode"),
        ("http://example.com/", "LORRY_WEBHOOK_ALLOW_HTTP"),
        ("ftp://example.com/", "Use a URL such as https://"),
    ],
)
def test_remedy_for_a_url_fits_its_problem(url: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        target_of(url, Rules())

    assert remedy in refused.value.remedy


def test_both_schemes_are_named_where_http_is_allowed() -> None:
    with pytest.raises(InvalidRequest, match="must start with https:// or http://"):
        target_of("ftp://example.com/", Rules(allow_http=True))


def test_url_is_parsed_as_it_will_be_requested() -> None:
    plain = target_of("https://hooks.example.com/a/b?c=d&e", Rules())
    other = target_of("http://[2606:4700::1111]:8080", Rules(allow_http=True))

    assert (plain.host, plain.port, plain.path, plain.authority) == (
        *("hooks.example.com", 443, "/a/b?c=d&e"),
        "hooks.example.com",
    )
    assert (other.host, other.path, other.authority) == ("2606:4700::1111", "/", "[2606:4700::1111]:8080")
