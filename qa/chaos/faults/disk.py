"""Faults of the disk: full for the trainers, for an export, for the store, for SQLite. Each has its own small disk."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx

from catalog.exports import commands as exports
from catalog.states import EndReason, JobState
from catalog.storage.manifest import Manifest
from catalog.tables.exports import UNFINISHED_EXPORTS, AdapterExport
from catalog.tables.storage import Artifact
from qa.chaos.scenario import SQLITE, Row
from qa.chaos.service import NUM_ROWS, SMALL, FaultSite

LONG_LEASE = {"LORRY_LEASE_SECONDS": "30"}
BLOCK_BYTES = 4096
MAX_ACCEPTED = 500
"""Limit for submissions that still fit into SQLite's log on a full disk."""


@contextmanager
def _full(disk: Path) -> Generator[None]:
    """Fill the disk to the last byte during the block."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        size = BLOCK_BYTES
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2
    try:
        yield
    finally:
        ballast.unlink()


def _at_step_15(site: FaultSite) -> str:
    job_id = site.submit_small()
    site.start_worker(FAILPOINT=f"step_15:wait={site.gate('go')}")
    site.wait_until(lambda: site.checkpoint_steps(job_id) == [10])
    site.wait_for_step(15, job_id)
    return job_id


def _under_trainers(site: FaultSite) -> str:
    """Fill the disk of the trainers' checkpoints, adapters, events and logs."""
    job_id = _at_step_15(site)
    with _full(site.settings.work_dir()):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))

    site.wait_for_success(job_id)

    attempts = site.attempts(job_id)
    assert set(site.reasons(job_id)) <= {EndReason.NODE_FAILED, EndReason.COMPLETED}, site.attempts_text(job_id)
    assert all((attempt.resumed_from_step or 0) >= 10 for attempt in attempts[1:]), site.attempts_text(job_id)
    return f"“{_warnings(site, job_id)[0]}” {site.attempts_text(job_id)}"


def _under_export(site: FaultSite) -> str:
    """Fill the disk of the folder in which an export is written, after its space was checked."""
    job_id = site.submit_small()
    worker = site.start_worker(FAILPOINT=f"exporting:wait={site.gate('go')}")
    site.wait_for_success(job_id)
    export = _create_export(site, job_id)
    site.wait_until(lambda: any("worker.children.exporter" in one.cmdline() for one in site.children_of(worker)))
    with _full(site.settings.work_dir()):
        site.gate("go").touch()
        site.wait_until(lambda: _shown(site, export).error is not None)
        waiting = _shown(site, export)
        assert (waiting.status, (waiting.error or {})["code"]) == ("queued", "out_of_space"), f"{waiting.error}"
        assert list(site.settings.work_dir().glob("scratch/*")) == []
        with site.db.read() as session:
            assert session.query(Artifact).where(Artifact.kind == "export").count() == 0
            files = session.get_one(Artifact, site.adapter(job_id).artifact).files
        assert site.store.verify(Manifest.from_rows("adapter", files)) == []
        assert (site.job(job_id).state, worker.poll()) == (JobState.SUCCEEDED, None)

    site.wait_until(lambda: _shown(site, export).status not in UNFINISHED_EXPORTS)

    done = _shown(site, export)
    assert done.status == "succeeded", f"{done.error}"
    assert list(site.settings.work_dir().glob("scratch/*")) == []
    return f"“{(waiting.error or {})['message']}” The second attempt succeeded after space was freed."


def _create_export(site: FaultSite, job_id: str) -> AdapterExport:
    adapter = site.adapter(job_id)
    return exports.create(site.db, caller=site.caller, adapter=adapter.id, format="merged")


def _shown(site: FaultSite, row: AdapterExport) -> AdapterExport:
    return exports.get(site.db, project_id=row.project_id, adapter=row.adapter_id, export=row.id)


def _under_store(site: FaultSite) -> str:
    """Fill the disk of the store. A checkpoint is lost, but an adapter waits for free space."""
    job_id = _at_step_15(site)
    with _full(site.settings.data_dir / "store"):
        site.gate("go").touch()
        site.wait_until(lambda: _warnings(site, job_id))
        site.wait_for_file("jobs/*/adapter/adapter_model.safetensors")
        site.wait_seconds(2)
        assert site.job(job_id).state == JobState.RUNNING
        assert site.checkpoint_steps(job_id) == [10]

    site.wait_for_success(job_id)

    assert site.reasons(job_id) == [EndReason.COMPLETED], site.attempts_text(job_id)
    return f"“{_warnings(site, job_id)[0]}” The adapter waited for free space; {site.attempts_text(job_id)}"


def _under_database(site: FaultSite) -> str:
    """Fill the disk of SQLite. Its log may have space for a few more submissions."""
    file_id = site.upload(NUM_ROWS)
    site.start_api()
    job_id = _at_step_15(site)
    with _full(site.folder / "database"):
        site.gate("go").touch()
        number, answer = 0, _submit(site, file_id, 0)
        while answer.status_code == 200 and number < MAX_ACCEPTED:
            number += 1
            answer = _submit(site, file_id, number)
        site.wait_seconds(2)
    assert answer.status_code == 507, f"{answer.status_code} {answer.text}"
    again = _submit(site, file_id, number)
    assert again.status_code == 200, again.text
    later = [accepted for ids in site.submissions.values() for accepted in ids]
    site.cancel(*later)

    site.wait_for_success(job_id)
    site.wait_for_end(*later)

    assert site.reasons(job_id) == [EndReason.COMPLETED], site.attempts_text(job_id)
    refusal = f"507 {answer.json()['error']['code']}"
    told = f"{number} submissions fitted, then {refusal}; accepted once there was free space again"
    return f"{told}. The running job: {site.attempts_text(job_id)}"


def _submit(site: FaultSite, file_id: str, number: int) -> httpx.Response:
    return site.post_job(file_id, idempotency_key=f"full-{number}", **SMALL)


def _warnings(site: FaultSite, job_id: str) -> list[str]:
    return [event.message for event in site.events(job_id) if event.level == "warn"]


ROWS = (
    Row(
        name="disk-full-trainers",
        fault="disk full for trainers' checkpoints, events and logs",
        also="reported by name; the last good checkpoint is kept",
        act=_under_trainers,
        small_disk="data/work",
        environment=LONG_LEASE,
    ),
    Row(
        name="disk-full-export",
        fault="disk full while an export is written",
        also="reported by name; job and adapter unharmed; no file left; the export succeeds once there is space",
        act=_under_export,
        small_disk="data/work",
    ),
    Row(
        name="disk-full-store",
        fault="disk full for the store",
        also="reported by name; the last good checkpoint is kept",
        act=_under_store,
        small_disk="data/store",
        environment=LONG_LEASE,
    ),
    Row(
        name="disk-full-database",
        fault="disk full for SQLite",
        also="reported by name; nothing is lost",
        act=_under_database,
        small_disk="database",
        databases=SQLITE,
        environment=LONG_LEASE,
    ),
)
