"""Logs redact everything that looks like a secret."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from catalog import logs, tracing
from catalog.logs import Redacted, Repetitions, configure, redact, set_up_handlers
from tests.json_log import lines_of


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
def test_secrets_are_redacted(text: str, canary: str) -> None:
    assert canary not in redact(text)


def test_tracebacks_are_redacted() -> None:
    try:
        raise ValueError("token=canary-123456")
    except ValueError:
        record = logging.LogRecord("lorry", logging.ERROR, "", 1, "crash", (), __import__("sys").exc_info())

    shown = Redacted("%(message)s").format(record)

    assert "ValueError" in shown
    assert "canary-123456" not in shown


def test_existing_handlers_keep_their_format_and_are_redacted() -> None:
    out = io.StringIO()
    logger = logging.Logger("celery")
    logger.addHandler(logging.StreamHandler(out))
    logger.handlers[0].setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))

    set_up_handlers(logger)
    logger.warning("token=canary-123456")

    assert out.getvalue() == "[WARNING] token=…\n"


def test_outgoing_request_urls_are_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
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

    logged = capfd.readouterr().err
    assert "the log is open" in logged
    assert "canary-123456" not in logged


def test_plain_text_is_unchanged() -> None:
    assert redact("request id=req_abc path=/v1/files status=200") == "request id=req_abc path=/v1/files status=200"


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def json_lines(monkeypatch: pytest.MonkeyPatch) -> tuple[logging.Logger, io.StringIO]:
    """Return a logger that writes JSON lines, and its output."""
    monkeypatch.setenv("LORRY_LOG_FORMAT", "json")
    out, logger = io.StringIO(), logging.Logger("lorry.tests")
    logger.addHandler(logging.StreamHandler(out))
    set_up_handlers(logger)
    return logger, out


def test_json_line_contains_its_subjects(json_lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = json_lines

    logger.warning("before")
    with logs.all_about({"worker": "w1"}), logs.about({"job": "ftjob-1", "claim": None}):
        with tracing.span("prepare", parent=PARENT), logs.about({"claim": "claim-1"}):
            logger.info('odd "%s"\nsecond line', "quotes")
        elsewhere = threading.Thread(target=logger.info, args=("of another thread",))
        elsewhere.start()
        elsewhere.join()

    before, within, other = lines_of(out)
    assert set(before) == {"time", "level", "logger", "message"}
    assert (before["level"], before["logger"], before["message"]) == ("warning", "lorry.tests", "before")
    subjects = {"worker": "w1", "job": "ftjob-1", "claim": "claim-1", "trace": PARENT[3:35]}
    assert {name: within[name] for name in subjects} == subjects
    assert within["message"] == 'odd "quotes"\nsecond line'
    assert (other["worker"], "job" in other) == ("w1", False)


def test_json_line_is_redacted_with_its_traceback(json_lines: tuple[logging.Logger, io.StringIO]) -> None:
    logger, out = json_lines

    try:
        raise ValueError('{"api_key": "canary-456-789"}')
    except ValueError:
        with logs.about({"request": "token=canary-123456"}):
            logger.exception('{"authorization": "Bearer canary-789-123"}')

    (line,) = lines_of(out)
    assert "canary" not in out.getvalue()
    assert "ValueError" in line["exception"]


def test_unknown_format_is_rejected_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORRY_LOG_FORMAT", "xml")

    with pytest.raises(SystemExit, match=r"'xml'\. Set it to json or text"):
        configure("info")


def test_equal_warnings_are_logged_once_in_thirty_seconds() -> None:
    now, out, logger = [0.0], io.StringIO(), logging.Logger("lorry.tests")
    logger.addHandler(logging.StreamHandler(out))
    logger.handlers[0].addFilter(Repetitions(logger.handlers[0], clock=lambda: now[0]))

    for second in range(61):
        now[0] = second
        logger.warning("The database is not responding.")
        logger.info("request")

    assert out.getvalue().count("not responding") == 3
    assert out.getvalue().count("request") == 61


def test_threads_log_different_warnings_while_old_ones_are_forgotten(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # switch threads as often as possible
    out, logger = io.StringIO(), logging.Logger("lorry.tests")
    logger.addHandler(logging.StreamHandler(out))
    logger.handlers[0].addFilter(Repetitions(logger.handlers[0], clock=partial(next, itertools.count(step=0.1))))
    together = threading.Barrier(4)

    def warn(thread: int) -> None:
        together.wait()
        for number in range(1000):
            logger.warning("file %d of thread %d", number, thread)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(warn, range(4)))

    expected = [f"file {number} of thread {thread}" for number in range(1000) for thread in range(4)]
    assert sorted(out.getvalue().splitlines()) == sorted(expected)


def test_warnings_with_other_subjects_or_a_traceback_are_never_omitted() -> None:
    out, logger = io.StringIO(), logging.Logger("lorry.tests")
    logger.addHandler(logging.StreamHandler(out))
    set_up_handlers(logger)

    for job in ("ftjob-1", "ftjob-2"):
        with logs.about({"job": job}):
            logger.warning("Not recorded.")
    for _ in range(2):
        logger.error("crash", exc_info=ValueError("reason"))

    assert out.getvalue().count("Not recorded.") == 2
    assert out.getvalue().count("ValueError: reason") == 2
