"""Reproduced equals recorded: real workers train an adapter again from its lineage record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from catalog.history import queries
from catalog.jobs import commands, reproduction, submission
from catalog.states import JobState
from catalog.tables.jobs import Job
from tests.worker_site import WorkerSite, worker_site

FIELDS: dict[str, Any] = {
    "max_steps": 6,
    "checkpoint_every_steps": 1000,
    "lora": {"rank": 4, "dropout": 0.1},
    "hyperparameters": {"batch_size": 8},
}


def reproduce(site: WorkerSite, job_id: str) -> str:
    prepared = reproduction.prepare(site.db, site.caller, site.adapter(job_id).id)
    return submission.create(site.db, caller=site.caller, request=prepared, body_digest=os.urandom(8).hex()).id


def verdict(site: WorkerSite, job_id: str) -> dict[str, Any]:
    job = site.job(job_id)
    assert job.state == JobState.SUCCEEDED, site.log()
    assert job.reproduces is not None
    assert job.reproduction is not None
    return job.reproduces | job.reproduction


def test_reproduced_equals_recorded_alone_and_next_to_a_packmate(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows, validation = site.upload(40), site.upload(8, seed=5)
        made = site.submit(rows, **FIELDS | {"validation_file": validation})
        site.work_until_done()
        assert site.job(made).state == JobState.SUCCEEDED, site.log()

        alone = reproduce(site, made)
        site.work_until_done()
        packed, mate = reproduce(site, made), site.submit(rows, seed=9, **FIELDS)
        site.work_until_done()

        (mates,) = queries.packmates(site.db, project_id=site.caller.project_id, job_id=packed).values()
        assert mates == [mate]
        for job_id in (alone, packed):
            found = verdict(site, job_id)
            assert (found["identical"], found["differences"]) == (True, []), found
            assert found["reproduced"] == found["expected"]
            assert found["expected"]["weights"] == site.weights_digest(made) == site.weights_digest(job_id)
            assert site.events(job_id)[-1].message == "The job has successfully completed"
            assert found["message"] in [event.message for event in site.events(job_id)]
        assert site.weights_digest(mate) != site.weights_digest(made)


def test_a_resumed_job_is_reproduced_and_an_altered_expectation_is_reported(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        made = site.submit(site.upload(40), **FIELDS)
        site.start_worker(FAILPOINT=f"step_3:wait={site.gate('pause')}")
        site.wait_for_step(3, made)
        commands.pause(site.db, project_id=site.caller.project_id, job_id=made)
        site.wait_for_message("pause")
        site.gate("pause").touch()
        site.wait_until(lambda: site.job(made).state == JobState.PAUSED)
        commands.resume(site.db, project_id=site.caller.project_id, job_id=made)
        site.wait_for_end(made)
        assert site.attempts(made)[1].resumed_from_step == 3

        same, altered = reproduce(site, made), reproduce(site, made)
        with site.db.write() as session:
            job = session.get_one(Job, altered)
            assert job.reproduces is not None
            digest = job.reproduces["expected"]["weights"]
            changed = ("0" if digest[0] != "0" else "1") + digest[1:]
            job.reproduces = {**job.reproduces, "expected": {**job.reproduces["expected"], "weights": changed}}
        site.wait_for_end(same, altered)

        assert verdict(site, same)["identical"], verdict(site, same)
        found = verdict(site, altered)
        assert (found["identical"], found["is_difference_expected"]) == (False, False)
        assert found["reproduced"]["weights"] == site.weights_digest(made) != found["expected"]["weights"]
        assert "its weights do not have the recorded SHA-256 digests" in found["message"]
        assert "A difference is not expected" in found["message"]
