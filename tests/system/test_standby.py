"""An idle worker keeps a standby trainer for the next job. Only the time shows the difference."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from catalog.states import JobState
from tests.worker_site import WAIT_SECONDS, is_gone_in_time, worker_site

WANTED = {"LORRY_STANDBY_TRAINER": "true"}


def children(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.slow
def test_jobs_in_standby_trainers_have_the_bytes_of_one_in_a_new_trainer(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        rows = site.upload(20)
        fields = {"max_steps": 4, "precision": "bfloat16"}
        launched = site.submit(rows, **fields)
        site.work_until_done()
        worker = site.start_worker(**WANTED)

        ready = []
        for _ in range(2):
            site.wait_until(site.standing_by)
            (pid,) = children(worker.pid)
            job_id = site.submit(rows, **fields)
            site.wait_for_end(job_id)
            ready.append((pid, job_id))

        assert ready[0][0] != ready[1][0]
        for pid, job_id in ready:
            assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
            assert site.weights_digest(job_id) == site.weights_digest(launched)
            assert site.adapter(job_id).lineage["attempts"][-1]["machine"]["pid"] == pid
        worker.terminate()
        assert worker.wait(WAIT_SECONDS) == 0, site.log()
        assert list((site.settings.work_dir() / "trainers").iterdir()) == []


def test_a_standby_exits_with_its_killed_worker_and_its_folder_is_deleted(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        worker = site.start_worker(**WANTED)
        site.wait_until(site.standing_by)
        (pid,) = children(worker.pid)
        (folder,) = site.standing_by()
        standby = psutil.Process(pid)

        worker.kill()

        assert is_gone_in_time(standby)
        site.work_until_done()
        assert not folder.exists()


@pytest.mark.slow
def test_a_killed_standby_costs_the_next_job_only_time(tmp_path: Path) -> None:
    with worker_site(tmp_path) as site:
        worker = site.start_worker(**WANTED)
        site.wait_until(site.standing_by)
        (pid,) = children(worker.pid)

        psutil.Process(pid).kill()

        job_id = site.submit(site.upload(20), max_steps=2)
        site.wait_for_end(job_id)
        assert site.job(job_id).state == JobState.SUCCEEDED, site.log()
        assert len(site.attempts(job_id)) == 1
