"""A lease that is checked before each change."""

from __future__ import annotations

import asyncio

import pytest

from api.serving import held_lease
from api.serving.held_lease import HeldLease, LeaseLost
from catalog.errors import Unavailable
from catalog.serving import keeping
from tests.suspension import NEEDS_BOOTTIME, Suspension


class Renewals:
    """Answers of the database: whether the lease was extended, or an error."""

    def __init__(self, *answers: bool | Unavailable) -> None:
        self.answers = list(answers)

    async def __call__(self) -> bool:
        answer = self.answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer


def test_valid_lease_needs_no_renewal() -> None:
    async def act() -> None:
        lease = HeldLease(Renewals(True))
        await lease.check()
        await lease.check()

    asyncio.run(act())


def test_expired_lease_is_renewed_before_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "ENDPOINT_LEASE_SECONDS", 0.0)

    async def act() -> None:
        lease = HeldLease(Renewals(True, False))
        await lease.check()
        with pytest.raises(LeaseLost):
            await lease.check()

    asyncio.run(act())


@NEEDS_BOOTTIME
def test_lease_that_expired_during_a_suspension_is_renewed_before_a_change(suspension: Suspension) -> None:
    async def act() -> None:
        lease = HeldLease(Renewals(True, False))
        await lease.check()
        suspension.add(keeping.ENDPOINT_LEASE_SECONDS)
        with pytest.raises(LeaseLost):
            await lease.check()

    asyncio.run(act())


def test_renewal_continues_after_an_outage_and_ends_with_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_lease, "RENEW_SECONDS", 0.0)
    down = Unavailable("database_unavailable")

    async def act() -> None:
        renewals = Renewals(True, down, True, False)
        lease = HeldLease(renewals)
        with pytest.raises(LeaseLost):
            await lease.keep()
        assert renewals.answers == []
        with pytest.raises(LeaseLost):
            await lease.check()

    asyncio.run(act())


@NEEDS_BOOTTIME
def test_thread_finds_an_expired_or_released_lease_lost(suspension: Suspension) -> None:
    async def act() -> None:
        lease = HeldLease(Renewals(True, True))
        with pytest.raises(LeaseLost):
            lease.check_now()
        await lease.check()
        lease.check_now()
        suspension.add(keeping.ENDPOINT_LEASE_SECONDS)
        with pytest.raises(LeaseLost):
            lease.check_now()
        await lease.check()
        lease.check_now()
        lease.end()
        with pytest.raises(LeaseLost):
            lease.check_now()

    asyncio.run(act())
