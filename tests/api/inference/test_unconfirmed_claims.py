"""Events of a claim wait until the database has confirmed the claim. Meanwhile, other answers continue."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from api.deps import Services
from api.inference import replies
from catalog.errors import Unavailable
from catalog.inference import claims, requests
from tests.api.inference.reply_service import CHAT, background, claimed, is_answered_by, post, send, texts
from tests.api.site import Site, until
from worker.session.reply_connections import ReplyConnections

pytestmark = pytest.mark.usefixtures("worker")


def test_burst_of_events_is_no_fault_of_the_client(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the claim is checked, more events arrive than a client may leave unread."""
    monkeypatch.setattr(replies, "SHARE_BYTES", 2**14)
    is_held = requests.is_held
    arrived = threading.Event()

    def slow_check(*given: Any) -> bool:
        arrived.wait(30)
        return is_held(*given)

    monkeypatch.setattr(requests, "is_held", slow_check)
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)
    pieces = ["x" * 10_000 for _ in range(160)]

    send(connections, claim, *texts(*pieces))
    queue = connections._connections[claim.reply_to]  # pyright: ignore[reportPrivateUsage]
    until(lambda: queue._num_queued_bytes < 1000)  # pyright: ignore[reportPrivateUsage]
    arrived.set()

    found = response.result(60)
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["message"]["content"] == "".join(pieces)


def test_answer_waits_while_the_database_does_not_answer(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [Unavailable("The database does not answer.", code="database_unavailable", remedy="Wait.")] * 2
    is_held = requests.is_held

    def failing(*given: Any) -> bool:
        if failures:
            raise failures.pop()
        return is_held(*given)

    monkeypatch.setattr(requests, "is_held", failing)
    monkeypatch.setattr(replies, "RETRY_SECONDS", 0.01)
    found = background(lambda: post(site, CHAT))
    claim = claimed(services)

    send(connections, claim, *texts("Hel", "lo"))

    assert found.result().json()["choices"][0]["message"]["content"] == "Hello"


def test_stale_claim_is_checked_once(
    site: Site, services: Services, connections: ReplyConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    is_held = requests.is_held
    monkeypatch.setattr(requests, "is_held", lambda db, *ids: checked.append(ids[1]) or is_held(db, *ids))
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)

    send(connections, claim, *texts("a", "b", "c"), claim_id="answer-stale")
    send(connections, claim, *texts("a"))

    assert response.result(30).status_code == 200
    assert checked == ["answer-stale", claim.claim_id]


@pytest.fixture
def unconfirmed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set of requests for whose claims the database does not answer."""
    chosen: set[str] = set()
    is_held = requests.is_held

    def check(db: Any, request_id: str, claim_id: str) -> bool:
        if request_id in chosen:
            raise Unavailable("The database does not answer.", code="database_unavailable", remedy="Wait.")
        return is_held(db, request_id, claim_id)

    monkeypatch.setattr(requests, "is_held", check)
    monkeypatch.setattr(replies, "RETRY_SECONDS", 0.01)
    return chosen


def test_claim_that_can_not_be_checked_delays_no_other_answer(
    site: Site, services: Services, connections: ReplyConnections, unconfirmed: set[str]
) -> None:
    confirmed = background(lambda: post(site, CHAT))
    claim = claimed(services)
    first, *rest = texts("Hel", "lo")
    send(connections, claim, first)
    until(lambda: is_answered_by(services, claim))
    waiting = background(lambda: post(site, CHAT))
    other = claimed(services)
    unconfirmed.add(other.request_id)

    send(connections, other, *texts("By", "e"))
    send(connections, claim, *rest)

    assert confirmed.result(30).json()["choices"][0]["message"]["content"] == "Hello"
    assert not waiting.done()
    unconfirmed.clear()
    assert waiting.result(30).json()["choices"][0]["message"]["content"] == "Bye"


def test_events_of_an_unconfirmed_claim_are_limited(
    site: Site,
    services: Services,
    connections: ReplyConnections,
    unconfirmed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond the limit, the worker stops. After its lease has expired, another one answers."""
    monkeypatch.setattr(replies, "MAX_BURST_BYTES", 5000)
    response = background(lambda: post(site, CHAT))
    claim = claimed(services)
    unconfirmed.add(claim.request_id)
    stopped: set[str] = set()

    def is_stopped() -> bool:
        stopped.update(connections.stopped())
        return claim.request_id in stopped

    send(connections, claim, *texts("x" * 1000, "x" * 9000))
    until(is_stopped)
    unconfirmed.clear()
    claims.release(services.db, [claim.claim_id])  # as if its lease had expired
    again = claimed(services)
    send(connections, claim, *texts("late"))
    send(connections, again, *texts("Hel", "lo"))

    assert response.result(30).json()["choices"][0]["message"]["content"] == "Hello"


def test_request_is_released_if_its_worker_is_lost_before_its_claim_is_confirmed(
    site: Site, services: Services, connections: ReplyConnections, unconfirmed: set[str]
) -> None:
    response = background(lambda: post(site, CHAT))
    lost = ReplyConnections()
    claim = claimed(services)
    unconfirmed.add(claim.request_id)
    send(lost, claim, *texts("Hel", "lo")[:2])
    lost.close()
    until(lambda: not services.replies._connections)  # pyright: ignore[reportPrivateUsage]

    unconfirmed.clear()

    send(connections, claimed(services), *texts("H", "ello"))
    assert response.result(30).json()["choices"][0]["message"]["content"] == "Hello"
