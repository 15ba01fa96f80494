"""The API server proves its identity to Lorry's client, which implements the proof independently."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.auth.service_identity import proof, secret_of
from lorry import Lorry, ServiceNotVerified, connection
from lorry.connection import Connection
from lorry.transport import service_identity
from tests.api.site import PEPPER, Site, error_of

NONCE = "0123456789abcdef" * 4


def test_client_trusts_only_its_own_installation(site: Site, tmp_path: Path) -> None:
    known = Connection(url=site.url, api_key=site.key, identity_secret=secret_of(PEPPER))
    connection.write(tmp_path, known)

    with Lorry(data_dir=tmp_path) as lorry:
        assert [file.id for file in lorry.files.list()] == [file.id for file in lorry.files.list()]

    other = Connection(url=site.url, api_key=site.key, identity_secret=secret_of(b"o" * 32))
    connection.write(tmp_path, other)
    with Lorry(data_dir=tmp_path) as lorry, pytest.raises(ServiceNotVerified):
        list(lorry.files.list())


@pytest.mark.parametrize(
    ("seen", "connected"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "0:0:0:0:0:0:0:1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("testserver", "testserver"),
    ],
)
def test_server_and_client_normalize_addresses_alike(seen: str, connected: str) -> None:
    computed = proof(PEPPER, nonce=NONCE, host=seen, port=8472)

    assert computed == service_identity.expected_proof(secret_of(PEPPER), nonce=NONCE, host=connected, port=8472)


def test_proof_is_bound_to_nonce_address_and_port(site: Site) -> None:
    def served_proof(nonce: str) -> str:
        with site.http() as client:
            return client.get("/v1/service_identity", params={"nonce": nonce}).json()["proof"]

    host, port = site.url.removeprefix("http://").split(":")

    assert served_proof(NONCE) == proof(PEPPER, nonce=NONCE, host=host, port=int(port))
    assert len({served_proof(NONCE), served_proof("0" * 64), proof(PEPPER, nonce=NONCE, host=host, port=1)}) == 3
    assert proof(PEPPER, nonce=NONCE, host="127.0.0.2", port=int(port)) != served_proof(NONCE)


@pytest.mark.parametrize("nonce", ["", "x" * 64, "0" * 63, "0" * 65, "A" * 64])
def test_invalid_nonce_is_rejected(anonymous: TestClient, nonce: str) -> None:
    response = anonymous.get("/v1/service_identity", params={"nonce": nonce})

    assert (response.status_code, error_of(response)["param"]) == (400, "nonce")


def test_identity_secret_differs_from_pepper_and_by_installation() -> None:
    assert secret_of(PEPPER) != secret_of(b"o" * 32)
    assert PEPPER.hex() not in secret_of(PEPPER)
