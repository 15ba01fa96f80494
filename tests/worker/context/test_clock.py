"""Lease timing includes the time in which the machine was suspended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from catalog.clock import boot_seconds
from lorry.local.parent_watch import LOST_PARENT
from tests.suspension import NEEDS_BOOTTIME, Suspension
from tests.worker.pack_site import PackSite
from worker.process import confined_child
from worker.process.confined_child import SIGN

ROOT = Path(__file__).parents[3]
WAKES_UP = """
import sys, threading, time
from worker.process import confined_child
clock, asleep = time.clock_gettime, 0.0
time.clock_gettime = lambda number: clock(number) + (asleep if number == time.CLOCK_BOOTTIME else 0.0)
confined_child.watch_pipe(sys.stdin.fileno(), silence_seconds=3600)
asleep = 4000.0
print("watching", flush=True)
threading.Event().wait()
"""


@NEEDS_BOOTTIME
def test_a_worker_gives_up_overdue_claims_after_a_suspension(site: PackSite, suspension: Suspension) -> None:
    killed: list[bool] = []
    claim = site.claim()
    site.context.heartbeat.release(claim.claim_id)
    site.context.heartbeat.guard(on_beat=None, on_lost=lambda: killed.append(True))
    site.context.heartbeat.hold([claim.claim_id], since=boot_seconds())
    site.context.heartbeat.abandon_overdue()
    before = list(killed)

    suspension.add(site.settings.lease_seconds)
    site.context.heartbeat.abandon_overdue()

    assert (before, killed) == ([], [True])
    assert site.context.heartbeat.take_directives([claim.claim_id])[claim.claim_id].stale


@NEEDS_BOOTTIME
def test_a_trainer_ignores_an_old_heartbeat_after_a_suspension() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WAKES_UP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"watching\n"
        try:
            child.stdin.write(SIGN.pack(boot_seconds()))
            child.stdin.flush()

            assert child.wait(30) == LOST_PARENT
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("sent", "is_ended"),
    [
        ([5.0, 12.0, 20.0], False),
        ([5.0, 8.0], True),
        ([5.0, 20.0], True),
        ([], True),
    ],
    ids=["heartbeats without a gap", "no recent heartbeat", "a gap longer than the lease", "no heartbeat"],
)
def test_a_starved_trainer_judges_heartbeats_by_their_send_time(
    monkeypatch: pytest.MonkeyPatch, sent: list[float], *, is_ended: bool
) -> None:
    """Its thread does not run from second 0 to 25, for example because another holds the GIL. The lease is 10 s."""

    class Survived(Exception):
        pass

    select_now, waits = select.select, list[float]()

    def selected(read: list[int], *others: list[int], **_: float) -> object:
        timeout = others[-1]
        if timeout == 0:
            return select_now(read, [], [], 0)
        waits.append(1)
        if len(waits) > 1:
            raise Survived
        return [], [], []

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(select, "select", selected)
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(confined_child, "boot_seconds", lambda: 25.0)
    reader, writer = os.pipe()
    for sent_at in sent:
        os.write(writer, SIGN.pack(sent_at))

    with pytest.raises((SystemExit, Survived)) as outcome:
        confined_child._watch(reader, 10.0, 0.0)

    assert outcome.type is (SystemExit if is_ended else Survived)
    os.close(reader)
    os.close(writer)
