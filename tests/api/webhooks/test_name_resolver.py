"""One project's names and tests hold up no other project's: stub resolvers, and receivers on loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from api.webhooks.http_sender import TESTS_OF_PROJECT, WebhookSender
from api.webhooks.name_resolver import ABSENT_SECONDS, LOOKUPS_OF_PROJECT, MAX_LOOKUPS, NameResolver, NoAddress
from catalog.webhooks.delivery_queue import DeliveryResult
from catalog.webhooks.url_policy import Rules, networks_of
from tests.api.hook_receiver import receiving

LOOPBACK = Rules(networks=networks_of("127.0.0.1/32"), allow_http=True)


class Names:
    """Hosts that begin with `hang` get no answer until `release`; `gone` has no address; the rest is loopback."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.release = asyncio.Event()

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host.startswith("hang"):
            await self.release.wait()
        if host.startswith("gone"):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return ["127.0.0.1"]


def settled() -> Coroutine[Any, Any, None]:
    """Every task has come as far as it can."""

    async def entry() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    return entry()


def test_names_that_are_never_answered_hold_up_their_own_project_alone() -> None:
    async def main() -> tuple[list[str], Sequence[str], Sequence[str]]:
        names = Names()
        resolver = NameResolver(names)
        hanging = [asyncio.create_task(resolver.resolve(f"hang-{n}", 443, project_id="noisy")) for n in range(40)]
        await settled()
        asked = list(names.asked)
        assert resolver.is_saturated("noisy")
        assert not resolver.is_saturated("quiet")
        found = await resolver.resolve("good.example.com", 443, project_id="quiet")
        names.release.set()
        return asked, found, (await asyncio.gather(*hanging))[-1]

    asked, found, last = asyncio.run(main())

    assert len(asked) == LOOKUPS_OF_PROJECT
    assert list(found) == list(last) == ["127.0.0.1"]


def test_the_process_has_so_many_lookups_at_once_and_is_saturated_for_all_then() -> None:
    async def main() -> tuple[int, bool]:
        names = Names()
        resolver = NameResolver(names)
        of_projects = (resolver.resolve(f"hang-{n}", 443, project_id=f"project {n}") for n in range(2 * MAX_LOOKUPS))
        tasks = [asyncio.create_task(one) for one in of_projects]
        await settled()
        told = len(names.asked), resolver.is_saturated("quiet")
        names.release.set()
        await asyncio.gather(*tasks)
        return told

    assert asyncio.run(main()) == (MAX_LOOKUPS, True)


def test_a_lookup_that_its_caller_gave_up_keeps_its_slot_and_is_not_begun_again() -> None:
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
        asked = list(names.asked)
        names.release.set()
        await asyncio.gather(*others)
        return asked

    assert asyncio.run(main()) == ["hang", "hang-0", "hang-1", "hang-2"]


def test_a_name_without_an_address_is_asked_for_again_after_a_minute_and_by_another_project() -> None:
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
            counts.append(len(names.asked))
        return counts

    assert asyncio.run(main()) == [1, 1, 2, 3]


def test_an_endpoint_is_reached_while_another_projects_names_hang_and_only_their_failures_say_nothing() -> None:
    async def main(port: str) -> tuple[DeliveryResult, list[DeliveryResult], DeliveryResult]:
        names = Names()
        sender = WebhookSender(LOOPBACK, lookup=names)

        def sent(host: str, project_id: str) -> Coroutine[Any, Any, DeliveryResult]:
            return sender.send(f"http://{host}:{port}/", project_id=project_id, body=b"{}", headers={})

        hanging = [asyncio.create_task(sent(f"hang-{n}", "noisy")) for n in range(10)]
        await settled()
        good = await sent("good.example.com", "quiet")
        # A name of the same project that has no address, while its lookups have no slot.
        waiting = asyncio.create_task(sent("gone.example.com", "noisy"))
        await settled()
        names.release.set()
        blameless = await waiting
        await asyncio.gather(*hanging)
        return good, [blameless], await sent("gone.example.com", "quiet")

    with receiving() as receiver:
        good, blameless, blamed = asyncio.run(main(receiver.url.rpartition(":")[2]))

    assert (good.status_code, good.says_of_endpoint) == (204, True)
    assert [outcome.says_of_endpoint for outcome in blameless] == [False]
    assert (blamed.error, blamed.says_of_endpoint) == ("The host gone.example.com has no address.", True)


def test_what_fails_after_the_connection_says_something_though_the_resolver_is_saturated() -> None:
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
    assert outcome.says_of_endpoint


def test_tests_of_one_project_leave_slots_to_others() -> None:
    async def main() -> tuple[int, bool]:
        slots, begun, release = WebhookSender(LOOPBACK).tests, list[str](), asyncio.Event()

        async def hold(project_id: str) -> None:
            async with slots.slot(project_id):
                begun.append(project_id)
                await release.wait()

        tasks = [asyncio.create_task(hold(project_id)) for project_id in [*["noisy"] * 40, "quiet"]]
        await settled()
        told = begun.count("noisy"), "quiet" in begun
        release.set()
        await asyncio.gather(*tasks)
        return told

    assert asyncio.run(main()) == (TESTS_OF_PROJECT, True)


def test_the_systems_lookup_waits_in_a_thread_that_keeps_no_process_alive(monkeypatch: pytest.MonkeyPatch) -> None:
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
