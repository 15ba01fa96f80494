"""Host names that the API server accepts, by the address on which it listens."""

from __future__ import annotations

import socket

import pytest

from api.middleware.http import host_policy, is_loopback
from api.settings import ApiSettings


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"])
def test_loopback_is_always_admitted(host: str) -> None:
    for bound in ("127.0.0.1", "0.0.0.0", "10.0.0.5"):
        assert host_policy(bound_host=bound, named=[]).admits(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[", "localhost.evil"]
)
def test_unknown_host_is_rejected_on_every_bound_address(host: str) -> None:
    for bound in ("127.0.0.1", "0.0.0.0", "10.0.0.5", "::"):
        assert not host_policy(bound_host=bound, named=["lorry.example.com"]).admits(host)


def test_address_is_admitted_if_the_server_listens_on_it() -> None:
    everywhere, one = host_policy(bound_host="0.0.0.0", named=[]), host_policy(bound_host="10.0.0.5", named=[])

    assert everywhere.admits("192.168.1.7:8000")
    assert everywhere.admits("[fe80::1]:8000")
    assert one.admits("10.0.0.5:8000")
    assert not one.admits("10.0.0.6:8000")
    assert not host_policy(bound_host="127.0.0.1", named=[]).admits("10.0.0.5")


def test_machine_name_is_admitted_if_bound_beyond_loopback() -> None:
    name = socket.gethostname()

    assert host_policy(bound_host="0.0.0.0", named=[]).admits(f"{name}:8000")


def test_operator_setting_adds_host_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_ALLOWED_HOSTS", " Lorry.Example.com, other ,")

    named = ApiSettings().named_hosts()

    assert named == ["lorry.example.com", "other"]
    assert host_policy(bound_host="127.0.0.1", named=named).admits("lorry.example.com")


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("", False)]
)
def test_is_loopback_recognizes_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
