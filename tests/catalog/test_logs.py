"""What looks like a secret does not leave the process by its log."""

from __future__ import annotations

import io
import logging

import httpx
import pytest

from catalog.logs import Redacted, configure, redact, redact_handlers


@pytest.mark.parametrize(
    ("text", "canary"),
    [
        ("key lorry_key-4d51116015910b6d_6d76xDh2kk5g1rO_pFqN9NcmOvIM50jRwkXmFHPNMTI used", "6d76xDh2kk5g1rO"),
        ("GET /sign-in?token=9v6mectzLkcQD4kp6aE74 HTTP/1.1", "9v6mectzL"),
        ("{'authorization': 'Bearer lorry-canary-123'}", "lorry-canary-123"),
        ('{"api_key": "canary-456-789"}', "canary-456"),
        ("no route to postgresql+psycopg://lorry:canary-9@db/lorry", "canary-9"),
        ("redis://:canary-9@cache:6379/0 does not answer", "canary-9"),
    ],
)
def test_secrets_are_taken_out(text: str, canary: str) -> None:
    assert canary not in redact(text)


def test_a_traceback_is_redacted_too() -> None:
    try:
        raise ValueError("token=canary-123456")
    except ValueError:
        record = logging.LogRecord("lorry", logging.ERROR, "", 1, "crash", (), __import__("sys").exc_info())

    shown = Redacted("%(message)s").format(record)

    assert "ValueError" in shown
    assert "canary-123456" not in shown


def test_handlers_that_a_library_set_up_are_redacted_in_their_own_form() -> None:
    out = io.StringIO()
    logger = logging.Logger("celery")
    logger.addHandler(logging.StreamHandler(out))
    logger.handlers[0].setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))

    redact_handlers(logger)
    logger.warning("token=canary-123456")

    assert out.getvalue() == "[WARNING] token=…\n"


def test_no_address_that_is_asked_gets_into_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers
    answering = httpx.MockTransport(lambda _: httpx.Response(204))
    try:
        configure("debug")
        with httpx.Client(transport=answering) as client:
            client.post("https://hooks.example.com/canary-123456")
        logging.getLogger("lorry.api").info("the log is open")
    finally:
        root.setLevel(before[0])
        root.handlers = before[1]

    told = capfd.readouterr().err
    assert "the log is open" in told
    assert "canary-123456" not in told


def test_plain_words_stay() -> None:
    assert redact("request id=req_abc path=/v1/files status=200") == "request id=req_abc path=/v1/files status=200"
