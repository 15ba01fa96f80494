"""A batch whose lease may have expired is given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from api.inference import batch_lease
from api.inference.batch_lease import LeasedBatch, Threads
from catalog.batches import execution
from catalog.batches.execution import BatchClaim, Directive
from catalog.errors import Unavailable
from catalog.tasks.task_queue import TaskClaim, TaskKind
from tests.suspension import NEEDS_BOOTTIME, Suspension

UNUSED: Any = SimpleNamespace()


@NEEDS_BOOTTIME
def test_batch_is_lost_after_a_suspension_if_its_lease_is_not_renewed(
    suspension: Suspension, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[bool] = []

    def renew(*_: object) -> Directive:
        renewals.append(batch.is_lost)
        if len(renewals) == 2:
            suspension.add(execution.BATCH_LEASE_SECONDS + 1)
        raise Unavailable("database_unavailable")

    monkeypatch.setattr(execution, "renew", renew)
    monkeypatch.setattr(batch_lease, "KEEP_SECONDS", 0.0)
    task = TaskClaim(claim_id="c", kind=TaskKind.BATCH, subject="b", num_attempts=1)
    claimed = BatchClaim(task=task, batch_id="b", project_id="p", endpoint="/v1/completions", input_digest="0")
    directive = Directive(status="in_progress", is_expired=False, seconds_left=3600, num_lines=1)
    batch = LeasedBatch(db=UNUSED, claimed=claimed, directive=directive, threads=Threads())

    async def keep() -> None:
        async with asyncio.timeout(30):
            await batch.keep()

    asyncio.run(keep())

    assert batch.is_lost
    assert batch.stopping.is_set()
    assert renewals == [False, False]
