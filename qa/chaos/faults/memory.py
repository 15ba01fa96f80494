"""Faults of memory: the kernel kills the trainer because its cgroup has reached its limit."""

from __future__ import annotations

import signal
import sys

from catalog.states import EndReason
from qa.chaos.scenario import Row
from qa.chaos.service import PATIENCE_SECONDS, FaultSite
from tests.services.memory_group import memory_group

HEADROOM_BYTES = 64 * 2**20
"""Enough for the next ticks of a trainer, but less than it suddenly allocates."""
TAKEN_BYTES = 8 * HEADROOM_BYTES


def _killed_by_the_kernel(site: FaultSite) -> str:
    """Run worker and trainer in their own cgroup, and set its limit during training. The trainer then allocates
    more."""
    job_id = site.submit_small()
    with memory_group() as group:
        argv = [sys.executable, "-m", "worker.entrypoints.loop", "--device", "cpu"]
        failpoint = f"step_15:wait={site.gate('go')},step_15:take={TAKEN_BYTES}"
        worker = site.start(group.argv(argv), FAILPOINT=failpoint)
        site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
        site.wait_for_step(15, job_id)
        group.limit(group.used_bytes() + HEADROOM_BYTES)
        site.gate("go").touch()
        site.wait_until(lambda: site.reasons(job_id)[:1] == [EndReason.HOST_OOM])
        group.limit(None)

        site.wait_for_success(job_id)

        assert site.reasons(job_id) == [EndReason.HOST_OOM, EndReason.COMPLETED], site.attempts_text(job_id)
        assert site.attempts(job_id)[1].resumed_from_step == 10
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(PATIENCE_SECONDS) == 0, site.log()
    return f"{site.attempts_text(job_id)}: {site.attempts(job_id)[0].detail}"


ROWS = (
    Row(
        name="trainer-oom-killed",
        fault="the kernel kills the trainer because its cgroup is out of memory",
        also="the right reason, the job resumes; the worker keeps running",
        act=_killed_by_the_kernel,
    ),
)
