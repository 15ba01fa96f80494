"""Faults of clocks: that of a worker and its trainers, or of the API server, is an hour off. Only the database's clock
must matter."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from pathlib import Path

from catalog.states import EndReason, JobState
from qa.chaos.scenario import Row
from qa.chaos.service import NUM_ROWS, SMALL, FaultSite

HOUR = 3600.0
LOOKS_SECONDS = 10.0
"""Time limit after the end of a lease for the API server to detect it, on a busy machine."""
LONG_LEASE = {"LORRY_LEASE_SECONDS": "20"}
"""Long enough that no worker loses its lease on a busy machine, which would look like an effect of the clock."""
LOST_ONCE = [EndReason.INFRA_LOST, EndReason.COMPLETED]
SHIFTED = '''"""Python runs this first. It shifts the wall clock, and creates a file named by the process id."""

import datetime
import os
import pathlib
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
(pathlib.Path(__file__).parent / str(os.getpid())).touch()
'''
"""The system's clock affects the whole machine. Compiled libraries such as SQLite still read the real clock."""


def _worker_off(site: FaultSite, *, seconds: float) -> str:
    """Next to a worker with the right clock, both keep their jobs for two leases. After a kill, the worker loses its
    job after exactly one lease."""
    site.start_api()
    theirs, shifted = site.submit_small(), _shifted(site, seconds)
    off = _worker(site, gate="off", PYTHONPATH=str(shifted))
    site.wait_for_step(15, theirs)
    _assert_is_off(shifted, off.pid, site.trainer_of(off).pid)
    ours = site.submit_small()
    right = _worker(site, gate="right")
    site.wait_for_step(15, ours)

    _assert_keep_their_jobs(site, theirs, ours)
    lost_after = _lost_by_its_lease(site, off, theirs)
    site.gate("off").touch()
    site.gate("right").touch()
    site.finish(theirs, ours)

    assert right.poll() is None, site.log()
    assert site.reasons(theirs) == LOST_ONCE, site.attempts_text(theirs)
    assert site.reasons(ours) == [EndReason.COMPLETED], site.attempts_text(ours)
    _assert_told_by_the_databases_clock(site, theirs, ours)
    return (
        "both kept their jobs for two leases; "
        f"after the kill, its job was requeued within {lost_after:.0f} s: {site.attempts_text(theirs)}"
    )


def _api_off(site: FaultSite, *, seconds: float) -> str:
    """It accepts a job between two others, whose order is preserved. It ends the lease of a killed worker after exactly
    one lease."""
    shifted = _shifted(site, seconds)
    api = site.start_api(PYTHONPATH=str(shifted))
    _assert_is_off(shifted, api.pid)
    file_id = site.upload(NUM_ROWS)
    first = site.submit(file_id, **SMALL)
    site.post_job(file_id, idempotency_key="off", **SMALL).raise_for_status()
    ((second,),) = site.submissions.values()
    third = site.submit(file_id, **SMALL)
    worker = _worker(site, gate="go")
    site.wait_for_step(15, first, second, third)

    _assert_keep_their_jobs(site, first)
    lost_after = _lost_by_its_lease(site, worker, first)
    site.gate("go").touch()
    site.finish(first, second, third, LORRY_MAX_JOBS_PER_TRAINER="1")

    began = [site.attempts(job_id)[0].started_at for job_id in (first, second, third)]
    assert began == sorted(began), f"they started at {began}"
    assert site.reasons(first) == LOST_ONCE, site.attempts_text(first)
    _assert_told_by_the_databases_clock(site, first, second, third)
    return f"jobs started in the order of submission; a killed worker's job was requeued {lost_after:.0f} s later"


def _worker(site: FaultSite, *, gate: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start a worker that takes one job, and waits at step 15."""
    return site.start_worker(LORRY_MAX_JOBS_PER_TRAINER="1", FAILPOINT=f"step_15:wait={site.gate(gate)}", **environment)


def _shifted(site: FaultSite, seconds: float) -> Path:
    folder = site.folder / "shifted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED.format(seconds=seconds))
    return folder


def _assert_is_off(shifted: Path, *pids: int) -> None:
    for pid in pids:
        assert (shifted / str(pid)).exists(), f"the clock of the process {pid} is right"


def _assert_keep_their_jobs(site: FaultSite, *job_ids: str) -> None:
    site.wait_seconds(2 * site.settings.lease_seconds)
    for job_id in job_ids:
        assert (site.job(job_id).state, len(site.attempts(job_id))) == (JobState.RUNNING, 1), site.attempts_text(job_id)


def _lost_by_its_lease(site: FaultSite, worker: subprocess.Popen[bytes], job_id: str) -> float:
    """Kill the worker, and wait until its job is lost. Returns the seconds."""
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    ends_at = site.job(job_id).lease_expires_at
    assert ends_at is not None
    lost_after = site.seconds_until(lambda: site.reasons(job_id)[:1] == [EndReason.INFRA_LOST])
    assert site.attempts(job_id)[0].ended_at >= ends_at, "its job was requeued before the lease had expired"
    assert lost_after < site.settings.lease_seconds + LOOKS_SECONDS, f"its lease ended {lost_after:.0f} s later"
    return lost_after


def _assert_told_by_the_databases_clock(site: FaultSite, *job_ids: str) -> None:
    """Check that the times of all events, attempts and jobs are close to each other, whatever process wrote them."""
    times = [event.created_at for job_id in job_ids for event in site.events(job_id)]
    times += [attempt.started_at for job_id in job_ids for attempt in site.attempts(job_id)]
    times += [site.job(job_id).created_at for job_id in job_ids]
    apart = max(times) - min(times)
    assert apart < HOUR / 2, f"recorded times differ by {apart:.0f} s"


ROWS = tuple(
    Row(
        name=f"{who}-clock-{name}",
        fault=f"{whose} is an hour {name}",
        also=also,
        act=partial(act, seconds=seconds),
        environment=LONG_LEASE,
    )
    for who, whose, also, act in (
        (
            "worker",
            "the clock of a worker and its trainers",
            "leases and order unchanged: each worker keeps its job, and a killed one loses it after its lease",
            _worker_off,
        ),
        (
            "api",
            "the API server's clock",
            "leases and order unchanged: jobs start in order, and a killed worker loses its job after its lease",
            _api_off,
        ),
    )
    for name, seconds in (("ahead", HOUR), ("behind", -HOUR))
)
