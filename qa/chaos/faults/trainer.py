"""Faults of a trainer: killed, crashed, exited with status 0, hanging."""

from __future__ import annotations

import re
import signal
import sys
from functools import partial

from catalog.history import job_logs
from catalog.states import EndReason, JobState
from qa.chaos.scenario import Row
from qa.chaos.service import PATIENCE_SECONDS, FaultSite

STANDS = re.compile(r"Current thread .*\n.* in _fail\n.* in pass_by\n.* in _handle_event")
"""Matches the failpoint of a step in a stack."""
CRASHED_ONCE = [EndReason.TRAINER_CRASHED, EndReason.COMPLETED]


def _signalled(site: FaultSite, *, number: signal.Signals) -> str:
    """Send a signal to the trainer only, at step 15. Its worker continues with a new trainer."""
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    site.wait_for_step(15, job_id)
    site.trainer_of(worker).send_signal(number)
    site.gate("go").touch()

    site.wait_for_success(job_id)

    assert site.reasons(job_id) == CRASHED_ONCE, site.attempts_text(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 10
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail}"


def _ended_as_if_well(site: FaultSite) -> str:
    """Exit with status 0 before the first checkpoint of a job, three times. The job is quarantined."""
    job_id = site.submit_small()
    site.start_worker(FAILPOINT="step_5:exit")

    site.wait_for_end(job_id)

    job = site.job(job_id)
    assert (job.state, (job.error or {}).get("code")) == (JobState.FAILED, "quarantined"), job.error
    assert site.reasons(job_id) == [EndReason.TRAINER_CRASHED] * 3, site.attempts_text(job_id)
    assert site.adapters() == []
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail}"


def _silent(site: FaultSite) -> str:
    """The trainer hangs during training. Its worker's time limit is reduced to 5 s."""
    job_id = site.submit_small()
    argv = [sys.executable, "-m", "qa.chaos.impatient_worker"]
    first = site.start(argv, FAILPOINT="step_15:hang")
    site.wait_until(lambda: site.reasons(job_id)[:1] == [EndReason.TIMEOUT])
    first.terminate()
    assert first.wait(PATIENCE_SECONDS) == 0, site.log()

    site.finish(job_id)

    assert site.attempts(job_id)[-1].resumed_from_step == 10, site.attempts_text(job_id)
    ranks = _stacks(site, job_id)
    assert ranks, "no log of the job contains the stacks of its trainer"
    assert all(STANDS.search(text) for text in ranks.values()), ranks
    detail = site.attempts(job_id)[0].detail
    return f"{site.attempts_text(job_id)}: {detail} The stacks of {len(ranks)} process are in its log"


def _stacks(site: FaultSite, job_id: str) -> dict[int, str]:
    """Return, by rank, the stacks in the logs of the first attempt."""
    told: dict[int, str] = {}
    given = {"project_id": site.caller.project_id, "job_id": job_id, "attempt": 1, "limit": 1000}
    for line in job_logs.lines(site.db, site.store, **given).items:
        told[line.rank] = f"{told.get(line.rank, '')}{line.text}\n"
    return {rank: text.partition("Stacks of its threads:")[2] for rank, text in told.items()}


ROWS = (
    Row(
        name="trainer-killed",
        fault="kill -9 of the trainer only",
        also="the right reason, the job resumes",
        act=partial(_signalled, number=signal.SIGKILL),
    ),
    Row(
        name="trainer-segfault",
        fault="the trainer is killed by SIGSEGV",
        also="the right reason, the job resumes",
        act=partial(_signalled, number=signal.SIGSEGV),
    ),
    Row(
        name="trainer-exit-0",
        fault="the trainer exits with status 0 and no adapter",
        also="the right reason; no success without an adapter",
        act=_ended_as_if_well,
    ),
    Row(
        name="trainer-hang",
        fault="the trainer hangs during training",
        also="the progress timeout kills it, with its stacks in the job's log; the job resumes",
        act=_silent,
    ),
)
