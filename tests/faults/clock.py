"""Faults of a clock: a worker's, with its trainers', is an hour ahead or behind. What decides is the database's."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from pathlib import Path

from catalog.states import EndReason, JobState
from tests.faults.row import Row
from tests.faults.site import FaultSite

HOUR = 3600.0
SHIFTED = '''"""Python runs this before anything else: its clock of the day tells another time."""

import datetime
import time

SECONDS = {seconds}
_real, _real_ns, _Real = time.time, time.time_ns, datetime.datetime


class Shifted(_Real):
    @classmethod
    def now(cls, tz=None):
        return _Real.now(tz) + datetime.timedelta(seconds=SECONDS)

    @classmethod
    def utcnow(cls):
        return _Real.utcnow() + datetime.timedelta(seconds=SECONDS)


time.time = lambda: _real() + SECONDS
time.time_ns = lambda: _real_ns() + int(SECONDS * 1e9)
datetime.datetime = Shifted
'''
"""The system's clock is the whole machine's, and what compiled libraries ask (SQLite's own, for one)."""


def _off(site: FaultSite, *, seconds: float) -> str:
    """One worker's clock is off. Beside one whose clock is right it keeps its job for two leases, and the other one
    keeps its own; killed, it loses its job after a lease, no sooner and no later."""
    theirs = site.submit_small()
    off = _worker(site, gate="off", PYTHONPATH=str(_shifted(site, seconds)))
    site.wait_for_step(15, theirs)
    ours = site.submit_small()
    right = _worker(site, gate="right")
    site.wait_for_step(15, ours)
    _assert_told_by_the_databases_clock(site, theirs, ours)

    site.wait_seconds(2 * site.settings.lease_seconds)

    for job_id in (theirs, ours):
        assert (site.job(job_id).state, len(site.attempts(job_id))) == (JobState.RUNNING, 1), site.told(job_id)
    off.send_signal(signal.SIGKILL)
    lost_after = site.seconds_until(lambda: site.reasons(theirs)[:1] == [EndReason.INFRA_LOST])
    assert lost_after < site.settings.lease_seconds + 10, f"its lease ended {lost_after:.0f} s after it"
    site.gate("off").touch()
    site.gate("right").touch()
    site.wait_for_success(theirs, ours)

    assert right.poll() is None, site.log()
    assert site.reasons(theirs) == [EndReason.INFRA_LOST, EndReason.COMPLETED], site.told(theirs)
    assert site.reasons(ours) == [EndReason.COMPLETED], site.told(ours)
    told = f"both kept their jobs for two leases; killed, its job was free {lost_after:.0f} s later"
    return f"{told}: {site.told(theirs)}"


def _worker(site: FaultSite, *, gate: str, **environment: str) -> subprocess.Popen[bytes]:
    """That takes one job, and waits with it at step 15."""
    return site.start_worker(LORRY_MAX_JOBS_PER_TRAINER="1", FAILPOINT=f"step_15:wait={site.gate(gate)}", **environment)


def _shifted(site: FaultSite, seconds: float) -> Path:
    folder = site.folder / "shifted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED.format(seconds=seconds))
    return folder


def _assert_told_by_the_databases_clock(site: FaultSite, theirs: str, ours: str) -> None:
    """Neither the events nor the attempt of the worker whose clock is off lie an hour away from the other's."""
    times = [event.created_at for job_id in (theirs, ours) for event in site.events(job_id)]
    times += [attempt.started_at for job_id in (theirs, ours) for attempt in site.attempts(job_id)]
    apart = max(times) - min(times)
    assert apart < HOUR / 2, f"{apart:.0f} s lie between what both have written"


ROWS = tuple(
    Row(
        name=f"worker-clock-{name}",
        fault=f"the clock of a worker and its trainers is an hour {name}",
        also="leases and order unchanged: each keeps its job, and a killed one loses it after its lease",
        act=partial(_off, seconds=seconds),
    )
    for name, seconds in (("ahead", HOUR), ("behind", -HOUR))
)
