"""A new job continues an adapter: trained, paused, verified and recorded by real workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalog.history import queries
from catalog.jobs import commands
from catalog.registry.lineage import verify as verify_record
from catalog.states import JobState
from tests.worker_site import worker_site


@pytest.mark.slow
def test_a_child_continues_its_parent_and_a_pause_changes_no_byte(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows, validation = site.upload(40), site.upload(8, seed=5)
        fields = {"validation_file": validation, "max_steps": 6, "checkpoint_every_steps": 1000}
        made = site.submit(rows, **fields, lora={"rank": 4, "init_lora_weights": "olora"})
        site.work_until_done()
        assert site.job(made).state == JobState.SUCCEEDED, site.log()
        parent = site.adapter(made)
        child, twin = (site.submit(rows, **fields, model=parent.name, lora={"dropout": 0.1}) for _ in range(2))

        site.start_worker(FAILPOINT=f"step_3:wait={site.gate('pause')}")
        site.wait_for_step(3, child, twin)
        commands.pause(site.db, project_id=site.caller.project_id, job_id=twin)
        site.wait_for_message("pause")
        site.gate("pause").touch()
        site.wait_until(lambda: site.job(twin).state == JobState.PAUSED)
        commands.resume(site.db, project_id=site.caller.project_id, job_id=twin)
        site.wait_for_end(child, twin)

        assert [site.job(job_id).state for job_id in (child, twin)] == [JobState.SUCCEEDED] * 2, site.log()
        assert site.attempts(twin)[1].resumed_from_step == 3
        assert site.weights_digest(child) == site.weights_digest(twin) != site.weights_digest(made)
        assert parent.evaluation is not None
        adapter = site.adapter(child)
        assert adapter.evaluation is not None
        assert adapter.evaluation["parent_loss"] == pytest.approx(parent.evaluation["loss"], abs=1e-6)
        assert adapter.evaluation["loss"] < adapter.evaluation["parent_loss"]
        assert adapter.lineage["graph"] == {"parents": [parent.lineage_id]}
        assert adapter.lineage["config"]["resolved"]["lora"]["rank"] == 8
        (paused_at,) = queries.checkpoints_page(site.db, project_id=site.caller.project_id, job_id=twin).items
        third = site.submit(rows, **{**fields, "max_steps": 1}, model=paused_at.name)
        site.wait_for_end(third)
        assert site.job(third).state == JobState.SUCCEEDED, site.log()
        points = queries.metrics(site.db, project_id=site.caller.project_id, job_id=twin, kind="valid")
        (loss_then,) = [point.loss for point in points if point.step == paused_at.step]
        evaluation = site.adapter(third).evaluation
        assert evaluation is not None
        assert evaluation["parent_loss"] == pytest.approx(loss_then, abs=1e-6)
        assert site.adapter(third).lineage["graph"] == {"parents": [paused_at.lineage_id]}
        assert verify_record(adapter.lineage, adapter.lineage_id, site.store.get_manifest(adapter.artifact)) == []
