"""A trainer of several processes, in a complete service: jobs end with the bytes of one, even if a process dies."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from catalog.states import EndReason, JobState
from tests.system.test_killed_worker import small_job
from tests.worker_site import worker_site


@pytest.mark.slow
def test_jobs_on_two_processes_equal_one_process_despite_a_kill(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows = site.upload(60)
        fields = small_job(max_steps=20, checkpoint_every_steps=5)
        alone = [site.submit(rows, **fields, seed=seed) for seed in (1, 2)]
        site.work_until_done()
        together = [site.submit(rows, **fields, seed=seed) for seed in (1, 2)]
        site.start_worker(LORRY_CPU_PROCESSES="2", FAILPOINT=f"step_12:wait={site.gate('kill')}")
        site.wait_for_step(12, *together)
        launcher = psutil.Process(site.trainer_pid(together[0])).parent()
        assert launcher is not None
        first, second = sorted(launcher.children(), key=lambda process: process.pid)

        second.kill()
        site.gate("kill").touch()
        site.wait_for_end(*together)

        assert not first.is_running()
        for ours, other in zip(together, alone, strict=True):
            assert site.job(ours).state == JobState.SUCCEEDED, site.log()
            assert site.reasons(ours) == [EndReason.TRAINER_CRASHED, EndReason.COMPLETED]
            assert site.attempts(ours)[1].resumed_from_step == 10
            assert site.weights_digest(ours) == site.weights_digest(other)
