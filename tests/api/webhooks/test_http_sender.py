"""One webhook request: sent only to a checked address, and bounded whatever the receiver does."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from api.webhooks.http_sender import REPLY_BYTES, WebhookSender
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.url_policy import Rules, networks_of
from tests.api.hook_receiver import Answer, Received, Receiver, receiving

LOOPBACK = Rules(networks=networks_of("127.0.0.1/32"), allow_http=True)


class Names:
    """A lookup that returns the given answers one after another, and repeats the last one."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.lookups: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.lookups.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def send(url: str, rules: Rules = LOOPBACK, **given: Any) -> DeliveryResult:
    sender = WebhookSender(rules, **given)
    return asyncio.run(sender.send(url, project_id="ours", body=b"{}", headers={"webhook-id": "evt-1"}))


def port_of(receiver: Receiver) -> str:
    return receiver.url.rpartition(":")[2]


def test_request_goes_to_the_checked_address_and_names_the_host(receiver: Receiver) -> None:
    names = Names(["127.0.0.1"], ["10.0.0.1"])

    outcome = send(f"http://hooks.example.com:{port_of(receiver)}/a?b=c", lookup=names)

    got = receiver.take()
    assert (outcome.status_code, outcome.is_success, outcome.error) == (204, True, None)
    assert (got.path, got.headers["host"], got.body) == ("/a?b=c", f"hooks.example.com:{port_of(receiver)}", b"{}")
    assert got.headers["webhook-id"] == "evt-1"
    assert names.lookups == ["hooks.example.com"]


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:169.254.169.254"], ["64:ff9b::7f00:1"], []]
)
def test_nothing_is_sent_to_a_host_with_an_internal_address(receiver: Receiver, addresses: list[str]) -> None:
    rules = Rules(allow_http=True)

    outcome = send(f"http://hooks.example.com:{port_of(receiver)}/", rules, lookup=Names(addresses))

    assert outcome.status_code is None
    assert "hooks.example.com" in (outcome.error or "")
    assert receiver.is_quiet()


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.0.0.1", "0177.0.0.1"])
def test_alternative_spellings_of_loopback_are_rejected(receiver: Receiver, host: str) -> None:
    outcome = send(f"http://{host}:{port_of(receiver)}/", Rules(allow_http=True))

    assert outcome.status_code is None
    assert receiver.is_quiet()


def test_host_without_an_address_is_reported() -> None:
    async def none(_host: str, _port: int) -> Sequence[str]:
        raise OSError("no such name")

    assert send("https://gone.example.com/", lookup=none).error == "The host gone.example.com has no address."


def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.answer = lambda _: Answer(status=307, headers={"location": f"{receiver.url}/inside"})

    outcome = send(f"{receiver.url}/")

    assert (outcome.status_code, outcome.is_success) == (307, False)
    assert receiver.take().path == "/"
    assert receiver.is_quiet()


def test_long_reply_is_truncated_and_escaped(receiver: Receiver) -> None:
    receiver.answer = lambda _: Answer(status=500, body=b"\x00\x1b[2Jn\xffo\n" + b"x" * 10_000_000)

    outcome = send(receiver.url)

    assert (outcome.reply or "").startswith("\\x00\\x1b[2Jn\\xffo\nxxx")
    assert len(outcome.reply or "") < 2 * REPLY_BYTES


def test_reply_that_takes_too_long_is_a_failure(receiver: Receiver) -> None:
    ended = threading.Event()

    def wait(_: Received) -> Answer:
        ended.wait(30)
        return Answer()

    receiver.answer = wait
    outcome = send(receiver.url, try_seconds=0.3)
    ended.set()

    assert outcome.status_code is None
    assert "within 0.3 seconds" in (outcome.error or "")


def test_reason_of_a_failed_request_ends_with_one_period() -> None:
    def close_after_reading() -> None:
        with server.accept()[0] as accepted:
            accepted.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Thread(target=close_after_reading, daemon=True)
        closing.start()
        outcome = send(f"http://127.0.0.1:{server.getsockname()[1]}/")
        closing.join(5)

    assert (outcome.error or "").rstrip(".") + "." == outcome.error


def test_refused_connection_is_reported_and_next_address_is_tried(receiver: Receiver) -> None:
    rules = Rules(networks=networks_of("127.0.0.0/8"), allow_http=True)
    url = f"http://hooks.example.com:{port_of(receiver)}/"

    both, none = (
        send(url, rules, lookup=Names(addresses)) for addresses in (["127.0.0.9", "127.0.0.1"], ["127.0.0.9"])
    )

    assert both.status_code == 204
    assert "The request failed" in (none.error or "")


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("120", 120, 120),
        ("soon", None, None),
        ("-5", None, None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Mon, 01 Jan 2024 00:00:00 +9999999999999999", None, None),
    ],
)
def test_retry_after_accepts_seconds_or_a_date(
    receiver: Receiver, text: str, low: float | None, high: float | None
) -> None:
    receiver.answer = lambda _: Answer(status=503, headers={"retry-after": text})

    found = send(receiver.url).retry_after

    assert found == low if low is None or high is None or found is None else low <= found <= high


def test_https_certificate_must_match_the_host_name(tmp_path: Path) -> None:
    serving, trusted = certificates(tmp_path, "hooks.example.com")
    names: list[str | None] = []
    serving.sni_callback = lambda _socket, name, _context: names.append(name)

    with receiving(serving) as receiver:
        right, wrong = (
            send(f"https://{host}:{port_of(receiver)}/", trusted=trusted, lookup=Names(["127.0.0.1"]))
            for host in ("hooks.example.com", "other.example.com")
        )
        untrusted = send(f"https://hooks.example.com:{port_of(receiver)}/", lookup=Names(["127.0.0.1"]))

    assert right.status_code == 204
    assert names[0] == "hooks.example.com"
    assert "certificate" in (wrong.error or "").lower()
    assert "certificate" in (untrusted.error or "").lower()


def certificates(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server context for `name`, and a client context that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cafile=str(pem))
