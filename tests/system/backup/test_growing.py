"""A service on one machine moves to PostgreSQL and a bucket while a job trains, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from catalog.maintenance.backup import references
from catalog.pepper import Pepper
from catalog.registry.lineage import verify as verify_record
from catalog.states import EndReason, JobState
from catalog.storage.manifest import Manifest
from catalog.tables.fleet import Worker
from catalog.tables.jobs import Job
from catalog.tables.storage import Adapter, Artifact
from catalog.tenancy import authentication
from tests.catalog.backup_service import blobs, content, without_restores
from tests.catalog.world import manifest, sha
from tests.services.s3 import new_bucket
from tests.worker_site import PEPPER, ROOT, SHORT_LEASE, WorkerSite, worker_site

NUM_JOBS, NUM_ADAPTERS = 1_000, 100
FIELDS: dict[str, Any] = {"hyperparameters": {"batch_size": 4}, "max_steps": 30, "checkpoint_every_steps": 10}


def row_of(site: WorkerSite, table: Any, job_id: str) -> dict[str, Any]:
    column = table.id if table is Job else table.job_id
    with site.db.read() as session:
        return dict(session.execute(sa.select(table.__table__).where(column == job_id)).mappings().one())


def add_history(site: WorkerSite, job_id: str) -> None:
    """Copy a finished job and its adapter until only one job of NUM_JOBS is missing. Each adapter has its own file."""
    job, adapter = row_of(site, Job, job_id), row_of(site, Adapter, job_id)
    jobs: list[dict[str, Any]] = []
    adapters: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    for number in range(NUM_JOBS - 2):
        has_adapter = number < NUM_ADAPTERS - 1
        state = JobState.SUCCEEDED if has_adapter else JobState.CANCELLED
        jobs.append({**job, "id": f"{job_id}-{number}", "state": state})
        if has_adapter:
            site.store.put_bytes(f"adapter {number}".encode())
            files: Manifest = manifest(f"adapter {number}")
            site.store.put_manifest(files)
            made = {"digest": files.digest, "kind": files.kind, "files": files.as_rows(), "num_bytes": files.num_bytes}
            artifacts.append({**made, "created_at": job["created_at"]})
            own = {"id": f"adapter-{number}", "name": f"{adapter['name']}-{number}", "lineage_id": sha(str(number))}
            adapters.append({**adapter, **own, "job_id": f"{job_id}-{number}", "artifact": files.digest})
    with site.db.write() as session:
        for table, rows in ((Job, jobs), (Artifact, artifacts), (Adapter, adapters)):
            session.execute(sa.insert(table), rows)


def command(environment: dict[str, str], *arguments: str) -> str:
    """Run `python -m api` with the pepper of the site. Returns its output."""
    argv, given = [sys.executable, "-m", "api", *arguments], {"LORRY_PEPPER": PEPPER, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        argv, env=os.environ | environment | given, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_service_with_a_running_job_grows_from_one_machine_to_many(
    tmp_path: Path, new_postgres_url: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORRY_DATABASE_URL", raising=False)
    bucket = new_bucket(s3_endpoint)
    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    many = {"LORRY_DATABASE_URL": new_postgres_url, "LORRY_STORE_URL": f"s3://{bucket.name}/lorry"}
    many |= {"LORRY_DATA_DIR": str(tmp_path / "many" / "data"), "LORRY_HEARTBEAT_SECONDS": "0.5", **SHORT_LEASE}
    (tmp_path / "many").mkdir()
    with worker_site(tmp_path / "one", **SHORT_LEASE) as one:
        rows = one.upload(60)
        undisturbed = one.submit(rows, **FIELDS)
        one.work_until_done()
        add_history(one, undisturbed)
        moved = one.submit(rows, **FIELDS)
        old_worker = one.start_worker(FAILPOINT="step_25:hang")
        one.wait_until(lambda: one.checkpoint_steps(moved) == [10, 20])
        one.stop_between_writes(old_worker)

        command(one.environment, "backup", str(tmp_path / "backups"))
        restored = command(many, "restore", str(tmp_path / "backups"))

        assert "no problems" in restored
        assert "tiny (" in restored, "the restore must name the base model's local path"
        old_worker.kill()
        there = WorkerSite(tmp_path / "many", **many)
        try:
            new_key = {*content(there.db)["api_keys"]} - {*content(one.db)["api_keys"]}
            assert len(new_key) == 1, "each site makes a key for itself"
            before, after = without_restores(content(one.db)), without_restores(content(there.db))
            own = {"api_keys", "audit_events"}
            assert {name: found for name, found in after.items() if name not in own} == {
                name: found for name, found in before.items() if name not in own
            }
            assert (len(after["jobs"]), len(after["adapters"])) == (NUM_JOBS, NUM_ADAPTERS)
            with there.db.read() as session:
                keys = references.named(session)
            stored = blobs(one.store.objects)  # also has objects of replaced checkpoints until the next cleanup
            assert blobs(there.store.objects) == {key: stored[key] for key in keys}
            pepper = Pepper(current=PEPPER.encode())
            assert authentication.authenticate(there.db, secret=one.key, pepper=pepper).is_operator

            there.start_worker()
            there.wait_for_end(moved)

            assert there.job(moved).state == JobState.SUCCEEDED, there.log()
            assert there.reasons(moved) == [EndReason.INFRA_LOST, EndReason.COMPLETED]
            assert there.attempts(moved)[1].resumed_from_step == 20
            assert there.weights_digest(moved) == there.weights_digest(undisturbed)
            for job_id in (moved, undisturbed):
                adapter = there.adapter(job_id)
                files = there.store.get_manifest(adapter.artifact)
                assert verify_record(adapter.lineage, adapter.lineage_id, files) == []
            with there.db.read() as session:
                assert session.get_one(Worker, there.job(moved).worker_id).host
            assert "no problems" in command(many, "verify")
        finally:
            there.close()
