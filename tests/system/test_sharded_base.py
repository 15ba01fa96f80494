"""A base sharded across two processes, in a complete service: claimed, trained, killed, resumed and published."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from catalog.jobs import explanation
from catalog.states import EndReason, JobState
from tests.system.test_killed_worker import small_job
from tests.worker_site import worker_site

pytestmark = pytest.mark.timeout(900)
SHARDED = {"LORRY_CPU_PROCESSES": "2", "LORRY_STRATEGY": "fsdp2"}


@pytest.mark.slow
def test_jobs_on_a_sharded_base_equal_one_alone_despite_a_killed_process(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows = site.upload(60)
        fields = small_job(max_steps=20, checkpoint_every_steps=5)
        alone = site.submit(rows, **fields, seed=1)
        site.work_until_done(**SHARDED)
        dora = site.submit(rows, **fields, seed=1, lora={"use_dora": True})
        together = [site.submit(rows, **fields, seed=seed) for seed in (1, 2)]
        site.start_worker(**SHARDED, FAILPOINT=f"step_12:wait={site.gate('kill')}")
        site.wait_for_step(12, *together)
        launcher = psutil.Process(site.trainer_pid(together[0])).parent()
        assert launcher is not None
        second = max(launcher.children(), key=lambda process: process.pid)

        second.kill()
        site.gate("kill").touch()
        site.wait_for_end(*together)

        assert [site.job(job).state for job in together] == [JobState.SUCCEEDED] * 2, site.log()
        for job in together:
            assert site.reasons(job) == [EndReason.TRAINER_CRASHED, EndReason.COMPLETED]
            assert site.attempts(job)[1].resumed_from_step == 10
            assert site.adapter(job).verification["passed"]
        assert site.weights_digest(together[0]) == site.weights_digest(alone)
        messages = [event.message for event in site.events(alone) if event.message.startswith("Strategy")]
        assert len(messages) == 1
        assert "Strategy fsdp2. LORRY_STRATEGY is fsdp2. Sharding across 2 devices needs about" in messages[0]
        waiting = site.job(dora)
        assert waiting.state == JobState.QUEUED
        why = explanation.explain(site.db, project_id=waiting.project_id, job_id=dora)["explanation"]
        assert "shards base models across its devices (LORRY_STRATEGY is fsdp2). DoRA needs the full weights" in why

        site.kill_all()
        site.work_until_done()
        assert site.job(dora).state == JobState.SUCCEEDED, "it trains on a replicated base"
