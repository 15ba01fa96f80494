"""Slow lookups and tests of one project do not delay other projects: stub resolvers, loopback receivers."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from api.webhooks.http_sender import (
    ABSENT_SECONDS,
    LOOKUPS_OF_PROJECT,
    MAX_LOOKUPS,
    TESTS_OF_PROJECT,
    NameResolver,
    NoAddress,
    WebhookSender,
)
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.url_policy import Rules, networks_of
from tests.api.hook_receiver import receiving

LOOPBACK = Rules(networks=networks_of("127.0.0.1/32"), allow_http=True)


class Names:
    """A lookup: `hang…` waits for `release`, `gone…` has no address, and every other host is loopback."""

    def __init__(self) -> None:
        self.queried: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.queried.append(host)
        if host.startswith("hang"):
            await self.release.wait()
        if host.startswith("gone"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return ["127.0.0.1"]


def settled() -> Coroutine[Any, Any, None]:
    """Let every task run until it waits."""

    async def entry() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    return entry()


def test_hanging_lookups_delay_only_their_own_project() -> None:
    async def main() -> tuple[list[str], Sequence[str], Sequence[str]]:
        names = Names()
        resolver = NameResolver(names)
        hanging = [asyncio.create_task(resolver.resolve(f"hang-{n}", 443, project_id="noisy")) for n in range(40)]
        await settled()
        queried = list(names.queried)
        assert resolver.is_saturated("noisy")
        assert not resolver.is_saturated("quiet")
        found = await resolver.resolve("good.example.com", 443, project_id="quiet")
        names.release.set()
        return queried, found, (await asyncio.gather(*hanging))[-1]

    queried, found, last = asyncio.run(main())

    assert len(queried) == LOOKUPS_OF_PROJECT
    assert list(found) == list(last) == ["127.0.0.1"]


def test_lookups_are_limited_per_process() -> None:
    async def main() -> tuple[int, bool]:
        names = Names()
        resolver = NameResolver(names)
        of_projects = (resolver.resolve(f"hang-{n}", 443, project_id=f"project {n}") for n in range(2 * MAX_LOOKUPS))
        tasks = [asyncio.create_task(one) for one in of_projects]
        await settled()
        result = len(names.queried), resolver.is_saturated("quiet")
        names.release.set()
        await asyncio.gather(*tasks)
        return result

    assert asyncio.run(main()) == (MAX_LOOKUPS, True)


def test_abandoned_lookup_keeps_its_slot_and_is_not_repeated() -> None:
    async def main() -> list[str]:
        names = Names()
        resolver = NameResolver(names)
        for _ in range(3):
            caller = asyncio.create_task(resolver.resolve("hang", 443, project_id="noisy"))
            await settled()
            caller.cancel()
            await settled()
        others = [asyncio.create_task(resolver.resolve(f"hang-{n}", 443, project_id="noisy")) for n in range(9)]
        await settled()
        queried = list(names.queried)
        names.release.set()
        await asyncio.gather(*others)
        return queried

    assert asyncio.run(main()) == ["hang", "hang-0", "hang-1", "hang-2"]


def test_negative_lookup_is_cached_for_a_minute_per_project() -> None:
    now = 1000.0

    async def main() -> list[int]:
        nonlocal now
        names = Names()
        resolver = NameResolver(names, clock=lambda: now)
        counts: list[int] = []
        for seconds, project_id in ((0.0, "ours"), (ABSENT_SECONDS - 1, "ours"), (0.0, "theirs"), (2.0, "ours")):
            now += seconds
            with pytest.raises(NoAddress):
                await resolver.resolve("gone.example.com", 443, project_id=project_id)
            counts.append(len(names.queried))
        return counts

    assert asyncio.run(main()) == [1, 1, 2, 3]


def test_saturated_lookups_of_a_project_do_not_affect_other_projects() -> None:
    async def main(port: str) -> tuple[DeliveryResult, list[DeliveryResult], DeliveryResult]:
        names = Names()
        sender = WebhookSender(LOOPBACK, lookup=names)

        def sent(host: str, project_id: str) -> Coroutine[Any, Any, DeliveryResult]:
            return sender.send(f"http://{host}:{port}/", project_id=project_id, body=b"{}", headers={})

        hanging = [asyncio.create_task(sent(f"hang-{n}", "noisy")) for n in range(10)]
        await settled()
        good = await sent("good.example.com", "quiet")
        # A host without an address, looked up while its project has no free lookup slot.
        waiting = asyncio.create_task(sent("gone.example.com", "noisy"))
        await settled()
        names.release.set()
        inconclusive = await waiting
        await asyncio.gather(*hanging)
        return good, [inconclusive], await sent("gone.example.com", "quiet")

    with receiving() as receiver:
        good, inconclusive, conclusive = asyncio.run(main(receiver.url.rpartition(":")[2]))

    assert (good.status_code, good.concerns_endpoint) == (204, True)
    assert [outcome.concerns_endpoint for outcome in inconclusive] == [False]
    assert (conclusive.error, conclusive.concerns_endpoint) == ("The host gone.example.com has no address.", True)


def test_failure_after_connecting_counts_despite_a_saturated_resolver() -> None:
    async def main(port: str) -> DeliveryResult:
        names = Names()
        sender = WebhookSender(LOOPBACK, lookup=names)
        found = asyncio.create_task(
            sender.send(f"http://good.example.com:{port}/", project_id="noisy", body=b"{}", headers={})
        )
        hanging = [
            asyncio.create_task(sender.send(f"http://hang-{n}/", project_id="noisy", body=b"{}", headers={}))
            for n in range(10)
        ]
        outcome = await found
        assert sender.resolver.is_saturated("noisy")
        names.release.set()
        for task in hanging:
            task.cancel()
        return outcome

    closing = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        connection, _ = closing.accept()
        connection.recv(1)
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    outcome = asyncio.run(main(str(closing.getsockname()[1])))
    thread.join()
    closing.close()

    assert outcome.status_code is None
    assert outcome.concerns_endpoint


def test_tests_of_one_project_leave_slots_to_others() -> None:
    async def main() -> tuple[int, bool]:
        slots, begun, release = WebhookSender(LOOPBACK).tests, list[str](), asyncio.Event()

        async def hold(project_id: str) -> None:
            async with slots.slot(project_id):
                begun.append(project_id)
                await release.wait()

        tasks = [asyncio.create_task(hold(project_id)) for project_id in [*["noisy"] * 40, "quiet"]]
        await settled()
        result = begun.count("noisy"), "quiet" in begun
        release.set()
        await asyncio.gather(*tasks)
        return result

    assert asyncio.run(main()) == (TESTS_OF_PROJECT, True)


def test_system_lookups_run_in_daemon_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[threading.Thread] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        seen.append(threading.current_thread())
        if host == "gone":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(0, 0, 0, "", ("192.0.2.1", port)), (0, 0, 0, "", ("192.0.2.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def main() -> Sequence[str]:
        resolver = NameResolver()
        with pytest.raises(NoAddress):
            await resolver.resolve("gone", 443, project_id="ours")
        return await resolver.resolve("there", 443, project_id="ours")

    assert list(asyncio.run(main())) == ["192.0.2.1"]
    assert all(thread.daemon and thread is not threading.main_thread() for thread in seen)
