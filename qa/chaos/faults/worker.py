"""Faults of a worker: killed at every stage, suspended and resumed, asked to shut down."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

from catalog.states import EndReason, JobState
from qa.chaos.scenario import POSTGRESQL, Row
from qa.chaos.service import PATIENCE_SECONDS, FaultSite

LOST_ONCE = [EndReason.INFRA_LOST, EndReason.COMPLETED]
RESUMES = "it resumes at most one checkpoint back, with the same bytes"
GONE = f"its trainer is gone within a second; {RESUMES}"
BEFORE_ANY_TRAINER = ("before_claim", "after_claim")
GRACE_SECONDS = 90.0
"""A guarantee: systemd and Compose kill a worker that takes longer to shut down."""


def _kills_itself(site: FaultSite, *, failpoint: str, reasons: list[EndReason], **fields: int) -> str:
    """kill -9 of the worker when it passes the failpoint."""
    job_id = site.submit_small(**fields)
    first = site.start_worker(FAILPOINT=f"{failpoint}:kill")
    assert first.wait(PATIENCE_SECONDS) == -signal.SIGKILL, site.log()
    seconds = site.seconds_until_alone()
    assert site.has_seen_trainer() == (failpoint not in BEFORE_ANY_TRAINER)

    site.finish(job_id)

    assert site.reasons(job_id) == reasons, site.attempts_text(job_id)
    _assert_resumed(site, job_id)
    gone = "there was no trainer yet" if failpoint in BEFORE_ANY_TRAINER else f"trainer gone {seconds:.1f} s later"
    return f"{gone}; {site.attempts_text(job_id)}"


def _killed_while(site: FaultSite, *, failpoint: str, is_there: Callable[[FaultSite, str], None]) -> str:
    """kill -9 of the worker while its trainer waits at the failpoint."""
    job_id = site.submit_small()
    first = site.start_worker(FAILPOINT=f"{failpoint}:hang")
    trainer = site.trainer_of(first)
    is_there(site, job_id)
    assert trainer.is_running()
    first.kill()
    first.wait()
    seconds = site.seconds_until_alone()

    site.finish(job_id)

    assert site.reasons(job_id) == LOST_ONCE, site.attempts_text(job_id)
    _assert_resumed(site, job_id)
    return f"trainer gone {seconds:.1f} s later; {site.attempts_text(job_id)}"


def _assert_resumed(site: FaultSite, job_id: str) -> None:
    """Check that each attempt resumed from the newest checkpoint that was recorded when the worker was lost."""
    attempts = site.attempts(job_id)
    told = [event for event in site.events(job_id) if event.message.startswith("Checkpoint created")]
    for lost, after in pairwise(attempts):
        there = [event.data["step"] for event in told if event.data and event.created_at <= lost.ended_at]
        assert (after.resumed_from_step or 0) == max(there, default=0), site.attempts_text(job_id)


def _is_loading(site: FaultSite, _job_id: str) -> None:
    site.wait_for_file("trainer.json")


def _is_at_step_25(site: FaultSite, job_id: str) -> None:
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10, 20])
    site.wait_for_step(25, job_id)


def _is_in_checkpoint(site: FaultSite, _job_id: str) -> None:
    site.wait_for_file("jobs/*/checkpoints/step-10-adapter/adapter_model.safetensors")


def _stopped_for_two_leases(site: FaultSite) -> str:
    job_id = site.submit_small()
    stopped = site.start_worker(FAILPOINT="step_15:hang")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    trainer = site.trainer_of(stopped)
    site.stop_between_writes(stopped)
    site.wait_seconds(2 * site.settings.lease_seconds)
    assert not trainer.is_running() or trainer.status() == "zombie", "the trainer of a suspended worker still runs"
    site.finish(job_id)
    before = [event.seq for event in site.events(job_id)]

    stopped.send_signal(signal.SIGCONT)
    site.wait_seconds(2 * site.settings.heartbeat_seconds)
    stopped.terminate()

    assert stopped.wait(PATIENCE_SECONDS) == 0, site.log()
    assert [event.seq for event in site.events(job_id)] == before, "it wrote after it had lost its claim"
    assert site.reasons(job_id) == LOST_ONCE, site.attempts_text(job_id)
    return f"{site.attempts_text(job_id)}; the resumed worker wrote nothing and exited with status 0"


def _stopped_amid_its_write(site: FaultSite) -> str:
    """Suspend a worker that holds the lock on its job's row, until the server ends its transaction."""
    job_id = site.submit_small()
    stopped = site.start_worker(FAILPOINT=f"in_complete:wait={site.gate('commit')}")
    site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
    site.wait_until(site.is_anybody_writing)
    stopped.send_signal(signal.SIGSTOP)
    site.finish(job_id)
    before = [event.seq for event in site.events(job_id)]
    site.gate("commit").touch()
    stopped.send_signal(signal.SIGCONT)
    site.wait_seconds(2 * site.settings.heartbeat_seconds)
    stopped.terminate()

    assert stopped.wait(PATIENCE_SECONDS) == 0, site.log()
    assert [event.seq for event in site.events(job_id)] == before, "it wrote after it had lost its claim"
    assert site.reasons(job_id) == LOST_ONCE, site.attempts_text(job_id)
    return f"{site.attempts_text(job_id)}; the resumed worker wrote nothing and exited with status 0"


def _asked_to_leave(site: FaultSite, *, with_api: bool) -> str:
    job_id = site.submit_small()
    if with_api:
        site.start_api()
    worker = site.start_worker(FAILPOINT=f"step_15:wait={site.gate('leave')}")
    site.wait_for_step(15, job_id)
    leaving: list[subprocess.Popen[bytes]] = [worker, *([site.api] if site.api else [])]
    for process in leaving:
        process.terminate()
    asked_at = time.monotonic()
    site.wait_for_message("drain")
    site.gate("leave").touch()

    assert [process.wait(PATIENCE_SECONDS) for process in leaving] == [0] * len(leaving), site.log()
    seconds = time.monotonic() - asked_at
    assert seconds < GRACE_SECONDS, f"they took {seconds:.0f} s to exit"

    job = site.job(job_id)
    assert (job.state, job.counted_attempts, job.claim_id) == (JobState.QUEUED, 0, None)
    site.finish(job_id)
    assert site.reasons(job_id) == [EndReason.DRAINED, EndReason.COMPLETED], site.attempts_text(job_id)
    assert site.attempts(job_id)[1].resumed_from_step == 15
    return f"gone {seconds:.1f} s later; {site.attempts_text(job_id)}; the first attempt does not count"


ROWS = (
    *(
        Row(
            name=f"worker-killed-{name}",
            fault=f"kill -9 of the worker {words}",
            also=also,
            act=partial(_kills_itself, failpoint=failpoint, reasons=reasons, **fields),
        )
        for name, words, failpoint, reasons, fields, also in (
            ("before-claim", "before it claims", "before_claim", [EndReason.COMPLETED], {}, "no job was started"),
            ("after-claim", "after it has claimed", "after_claim", LOST_ONCE, {}, RESUMES),
            ("storing-checkpoint", "while it stores a checkpoint", "uploading", LOST_ONCE, {}, GONE),
            (
                "storing-adapter",
                "while it stores the adapter",
                "uploading",
                LOST_ONCE,
                {"checkpoint_every_steps": 1000},
                GONE,
            ),
            ("before-complete", "before the completing transaction", "before_complete", LOST_ONCE, {}, GONE),
            ("in-complete", "in the completing transaction", "in_complete", LOST_ONCE, {}, GONE),
            (
                "after-complete",
                "after the completing commit",
                "after_complete",
                [EndReason.COMPLETED],
                {},
                "its trainer is gone within a second; nothing runs again",
            ),
        )
    ),
    *(
        Row(
            name=f"worker-killed-{name}",
            fault=f"kill -9 of the worker {words}",
            also=GONE,
            act=partial(_killed_while, failpoint=failpoint, is_there=is_there),
        )
        for name, words, failpoint, is_there in (
            ("loading", "while its trainer loads the base model", "loading", _is_loading),
            ("at-step", "at step 25 of 30", "step_25", _is_at_step_25),
            ("in-checkpoint", "while its trainer writes a checkpoint", "in_checkpoint", _is_in_checkpoint),
        )
    ),
    Row(
        name="worker-stopped",
        fault="SIGSTOP of a worker for two leases, then SIGCONT",
        also="its writes are refused, and its trainer exits without it",
        act=_stopped_for_two_leases,
    ),
    Row(
        name="worker-stopped-writing",
        fault="SIGSTOP of a worker in the completing transaction, then SIGCONT",
        also="its row is unlocked after half a minute; its writes are refused",
        act=_stopped_amid_its_write,
        databases=POSTGRESQL,
    ),
    Row(
        name="worker-sigterm",
        fault="SIGTERM of a worker during training",
        also="drained within the grace time; the attempt does not count",
        act=partial(_asked_to_leave, with_api=False),
    ),
    Row(
        name="all-sigterm",
        fault="SIGTERM of worker and API server together",
        also="drained within the grace time; the attempt does not count",
        act=partial(_asked_to_leave, with_api=True),
    ),
)
