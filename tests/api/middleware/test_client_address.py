"""The address of a client behind proxies, and the host names that the API server accepts."""

from __future__ import annotations

import logging
import socket
from ipaddress import ip_network

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from api.middleware.client_address import resolve
from api.middleware.http import host_policy, is_loopback
from api.settings import ApiSettings
from catalog.settings import InvalidSettings, Settings
from tests.catalog.world import World

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def resolved(peer: str, *forwarded: str) -> str | None:
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    return resolve({"type": "http", "client": (peer, 1), "headers": headers}, PROXIES)


def test_direct_client_cannot_forge_its_address() -> None:
    assert resolved("203.0.113.7") == "203.0.113.7"
    assert resolved("203.0.113.7", "198.51.100.1") == "203.0.113.7"


def test_rightmost_untrusted_hop_is_the_client() -> None:
    assert resolved("10.0.0.1", "198.51.100.1") == "198.51.100.1"
    assert resolved("10.0.0.1", "192.0.2.66, 198.51.100.1, 10.0.0.2") == "198.51.100.1"
    assert resolved("10.0.0.1", "192.0.2.66", "198.51.100.1, 10.0.0.2") == "198.51.100.1"
    assert resolved("10.0.0.1", "10.0.0.3") == "10.0.0.3"
    assert resolved("10.0.0.1") == "10.0.0.1"


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("198.51.100.1:4711", "198.51.100.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
    ],
)
def test_ports_are_stripped_and_mapped_addresses_become_ipv4(entry: str, address: str) -> None:
    assert resolved("10.0.0.1", entry) == address
    assert resolved("::ffff:10.0.0.1", entry) == address


@pytest.mark.parametrize("entry", ["unknown", "", "a\nb", "198.51.100.1, nonsense", "x" * 10_000, ", " * 5_000])
def test_invalid_entry_resolves_to_the_proxy_that_sent_it(entry: str) -> None:
    assert resolved("10.0.0.1", entry) == "10.0.0.1"


def test_forwarded_chain_is_read_up_to_a_limit() -> None:
    assert resolved("10.0.0.1", ", ".join(["198.51.100.1", *["10.0.0.2"] * 100])) == "10.0.0.2"


def test_connection_without_address_resolves_to_none() -> None:
    assert resolve({"type": "http", "client": None, "headers": []}, PROXIES) is None


@pytest.mark.parametrize("text", ["10.0.0.1/8", "proxy.example", "10.0.0.0/8;10.1.0.0/16"])
def test_invalid_trusted_proxies_setting_is_rejected(text: str) -> None:
    with pytest.raises(InvalidSettings, match="LORRY_TRUSTED_PROXIES is invalid"):
        ApiSettings(trusted_proxies=text)


def test_access_log_and_the_audit_log_name_the_client_behind_the_proxy(
    settings: Settings, world: World, key: str, operator_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(settings, ApiSettings(trusted_proxies="127.0.0.1/32"))
    headers = {"authorization": f"Bearer {key}", "x-forwarded-for": "192.0.2.66, 198.51.100.1"}
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)) as proxied:
        caplog.set_level(logging.INFO, logger="lorry.api")

        made = proxied.post(
            "/v1/fine_tuning/jobs", json={"model": "smol", "training_file": world.file_id}, headers=headers
        )

        bearer = {"authorization": f"Bearer {operator_key}"}
        event = proxied.get("/v1/audit_events", params={"limit": 1}, headers=bearer).json()["data"][0]
    assert made.status_code == 200, made.text
    assert (event["type"], event["address"]) == ("job.created", "198.51.100.1")
    (line,) = [text for text in caplog.messages if "path=/v1/fine_tuning/jobs" in text]
    assert " address=198.51.100.1" in line
    assert f" key={key.split('_')[1]} " in line
    assert f" project={world.caller.project_id} " in line


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
