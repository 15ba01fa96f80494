"""The auditor finds violations of each invariant that are planted in a correct database."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from catalog.audit import chain
from catalog.db.database import Database
from catalog.jobs import commands
from catalog.lifecycle import recording
from catalog.queue import claims
from catalog.states import EndReason
from catalog.storage.object_storage import Objects
from catalog.storage.store import ArtifactStore
from catalog.tables.storage import Artifact, File
from catalog.webhooks import delivery_queue, endpoints
from qa.chaos.audit.auditor import audit
from qa.chaos.audit.findings import Finding, Hook, Invariant, Seen, Sighting
from tests.catalog.world import PEPPER, Clock, World, curves, manifest, request, sha

LEASE = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A correct database with a job that succeeded at its second attempt, and one that was cancelled."""

    folder: Path
    succeeded: str
    cancelled: str
    event_id: str
    claim_ids: tuple[str, ...]
    now: float

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder / 'lorry.db'}"

    def change(self, *statements: str) -> None:
        """Change the database directly, without the catalog."""
        engine = create_engine(self.url)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(text(statement.format(job=self.succeeded, other=self.cancelled)))
        engine.dispose()

    def blob(self, content: str) -> Path:
        return self.folder / "store" / "blobs" / sha(content)[:2] / sha(content)

    def findings(self, seen: Seen | None = None, **given: Any) -> list[Finding]:
        store_url = (self.folder / "store").as_uri()
        given = {"store_url": store_url, "lease_seconds": LEASE, "now": self.now, **given}
        return audit(self.url, seen=seen, work_dir=self.folder / "work", pepper=PEPPER.current, **given)

    def found(self, seen: Seen | None = None) -> set[Invariant]:
        return {finding.invariant for finding in self.findings(seen)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Site:
    folder, clock = tmp_path_factory.mktemp("good"), Clock()
    shutil.copy(migrated_database, folder / "lorry.db")
    (folder / "work").mkdir()
    db = Database(f"sqlite:///{folder / 'lorry.db'}", clock=clock)
    world = World(db, clock)
    events: Any = ["fine_tuning.job.succeeded", "fine_tuning.job.cancelled"]
    hook = {"name": "ops", "url": "https://example.com/hook", "event_types": events, "pepper": PEPPER}
    endpoints.create(db, project_id=world.caller.project_id, **hook)
    job = world.send(request(training_file=world.file_id), idempotency_key="key-1")
    world.prepare_all()
    (lost,) = world.claim()
    claims.end(db, lost.claim_id, reason=EndReason.INFRA_LOST, detail="")
    clock.advance(60)
    (claim,) = world.claim()
    saved = manifest("checkpoint", kind="checkpoint")
    recording.record_checkpoint(db, claim.claim_id, step=5, artifact=saved)
    world.complete(claim.claim_id)
    other = world.queued()
    commands.cancel(db, **world.of(other.id))
    turn = delivery_queue.claim(db, pepper=PEPPER)
    assert turn is not None
    sent = turn.deliveries
    for outgoing in sent:
        delivery_queue.record(
            db, outgoing, delivery_queue.DeliveryResult(started_at=clock.now, seconds=0.1, status_code=204)
        )
    chain.seal(db, pepper=PEPPER.current)
    _store(db, ArtifactStore(Objects((folder / "store").as_uri())), f"curves of {claim.claim_id}")
    db.close()
    event_id = next(one.message_id for one in sent if job.id.encode() in one.body)
    claim_ids = (lost.claim_id, claim.claim_id)
    ids = {"succeeded": job.id, "cancelled": other.id, "event_id": event_id, "claim_ids": claim_ids}
    return Site(folder=folder, now=clock.now, **ids)


def _store(db: Database, store: ArtifactStore, curves_text: str) -> None:
    """Store the contents that the world names only by digest. The content of a file is its id."""
    with db.write() as session:
        for file in session.query(File):
            content = curves_text if file.digest == curves(curves_text).digest else file.id
            file.num_bytes = store.put_bytes(content.encode()).num_bytes
        contents = {sha(each): each for each in ("adapter", "checkpoint")}
        contents |= {sha(f"tokens {file.digest}"): f"tokens {file.digest}" for file in session.query(File)}
        for row in session.query(Artifact):
            (file,) = row.files
            store.put_bytes(contents[file["digest"]].encode())
            store.put_manifest(manifest(contents[file["digest"]], kind=row.kind))


@pytest.fixture
def site(kept: Site, tmp_path: Path) -> Site:
    """Return a copy that the test may damage."""
    shutil.copytree(kept.folder, tmp_path / "copy")
    fields = {name: getattr(kept, name) for name in ("succeeded", "cancelled", "event_id", "claim_ids", "now")}
    return Site(folder=tmp_path / "copy", **fields)


def test_a_correct_database_has_no_findings(site: Site) -> None:
    hook = Hook(event_id=site.event_id, event_type="fine_tuning.job.succeeded", job_id=site.succeeded)
    first, second = (
        Sighting(pid=pid, claim_id=claim_id, first_at=at, last_at=at + 50.0)
        for pid, (claim_id, at) in enumerate(zip(site.claim_ids, (0.0, 40.0), strict=True))
    )
    cancelled = next(row["event_id"] for row in _deliveries(site) if row["event_id"] != site.event_id)
    other = Hook(event_id=cancelled, event_type="fine_tuning.job.cancelled", job_id=site.cancelled)
    seen = Seen(submissions={"key-1": [site.succeeded] * 2}, hooks=[hook, hook, other], trainers=[first, second])

    assert site.findings() == []
    assert site.findings(seen) == []


PLANTED: dict[str, tuple[Invariant, str]] = {
    "a job that never finished": ("I1", "update jobs set state = 'paused', finished_at = null where id = '{job}'"),
    "a job that continued after its end": (
        "I1",
        "insert into events (job_id, created_at, level, type, message, data) values ('{job}', 0, 'info', 'transition',"
        ' \'\', \'{{"from": "succeeded", "to": "queued", "verb": "requeue", "reason": null}}\')',
    ),
    "two completed attempts": ("I2", "update attempts set reason = 'completed' where job_id = '{job}'"),
    "an older attempt that completed the job": (
        "I2",
        "update attempts set reason = case number when 1 then 'completed' else 'infra_lost' end where job_id = '{job}'",
    ),
    "a success without an adapter": ("I2", "delete from adapters"),
    "a missing attempt": ("I2", "delete from attempts where number = 1"),
    "overlapping attempts": ("I3", "update attempts set ended_at = ended_at + 100 where number = 1"),
    "an adapter without its artifact": ("I4", "delete from artifacts where kind = 'adapter'"),
    "an adapter that failed its verification": ("I4", "update adapters set verification = '{{\"passed\": false}}'"),
    "a file of another size": ("I4", "update files set num_bytes = num_bytes + 1"),
    "a key of another request": ("I5", "update idempotency_keys set body_digest = 'another'"),
    "two jobs of one request": ("I5", "update audit_events set request_id = 'req_1' where type = 'job.created'"),
    "no webhook delivery": ("I6", "delete from webhook_tries; delete from webhook_deliveries"),
    "no successful delivery attempt": ("I6", "update webhook_tries set status_code = 500"),
    "a delivery of another event type": ("I6", "update webhook_deliveries set event_type = 'fine_tuning.job.failed'"),
    "a pending delivery": ("I6", "update webhook_deliveries set status = 'pending'"),
    "a failed delivery": ("I6", "update webhook_deliveries set status = 'failed', next_try_at = null"),
    "a claim on a finished job": (
        "I7",
        "update jobs set claim_id = 'claim-x', lease_expires_at = 2e9 where id = '{job}'",
    ),
    "an expired lease": ("I7", "update jobs set lease_expires_at = 1"),
    "an open attempt": ("I7", "update attempts set ended_at = null where number = 2"),
    "a queue position of a finished job": ("I7", "update jobs set queued_at = 1"),
    "an open trainer": (
        "I7",
        "insert into workers (id, host, pid, devices, integrations, version, protocol, memory_bytes, started_at,"
        " heartbeat_at, ended_at, drain_requested) values ('w9', '', 1, '[]', '[]', '', 2, 1, 0, 0, 1, false);"
        " insert into trainers (id, worker_id, base_digest, pack_key, started_at) values ('t9', 'w9', '', '', 0)",
    ),
    "a transition without an event": (
        "I8",
        "delete from events where seq = (select min(seq) from events where type = 'transition' and job_id = '{job}')",
    ),
    "a state without a transition": ("I8", "update jobs set state = 'failed' where id = '{job}'"),
    "an invalid transition": ("I8", "update events set data = replace(data, '\"complete\"', '\"resume\"')"),
    "a creation without an audit event": (
        "I8",
        "update audit_events set type = 'job.held' where type = 'job.created' and object_id = '{job}'",
    ),
    "a cancellation without an audit event": (
        "I8",
        "update audit_events set object_id = 'x' where type = 'job.cancelled'",
    ),
    "a changed audit event": ("I8", "update audit_events set actor_name = 'another' where link = 3"),
    "a missing audit event": ("I8", "delete from audit_events where link = 3"),
    "a missing last audit event": (
        "I8",
        "delete from audit_events where link = (select max(link) from audit_events)",
    ),
}


@pytest.mark.parametrize(("invariant", "statements"), PLANTED.values(), ids=PLANTED.keys())
def test_a_violation_in_a_table_is_found(site: Site, invariant: Invariant, statements: str) -> None:
    site.change(*statements.split(";"))

    assert invariant in site.found()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [Path.unlink, _flip, lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("content", ["adapter", "checkpoint"])
def test_a_missing_or_changed_stored_file_is_found(site: Site, content: str, spoil: Callable[[Path], None]) -> None:
    spoil(site.blob(content))

    assert site.found() == {"I4"}


@pytest.mark.parametrize("spoil", [Path.unlink, _flip])
def test_a_missing_or_changed_manifest_is_found(site: Site, spoil: Callable[[Path], None]) -> None:
    spoil(site.folder / "store" / "manifests" / f"{manifest('adapter').digest}.json")

    assert site.found() == {"I4"}


def test_two_jobs_for_one_key_and_a_lost_accepted_job_are_found(site: Site) -> None:
    assert site.found(Seen(submissions={"key-1": [site.succeeded, site.cancelled]})) == {"I5"}
    assert site.found(Seen(submissions={"key-2": [site.succeeded]})) == {"I5"}
    assert site.found(Seen(submissions={"key-1": ["ftjob-gone"]})) == {"I1", "I5"}


def test_a_webhook_that_never_arrived_or_has_another_id_is_found(site: Site) -> None:
    strange = Hook(event_id="evt-other", event_type="fine_tuning.job.succeeded", job_id=site.succeeded)

    sentences = [finding.sentence for finding in site.findings(Seen(hooks=[strange]))]

    assert any(site.event_id in sentence and "never came" in sentence for sentence in sentences)
    assert any("evt-other" in sentence for sentence in sentences)


def test_a_test_webhook_does_not_count_as_the_end_of_a_job(site: Site) -> None:
    columns = "endpoint_id, event_at, data, created_at, num_tries, num_tries_before"
    fields = f"insert into webhook_deliveries (id, event_id, event_type, status, is_test, {columns})"
    values = f"select 'delivery-test', 'evt-test-1', event_type, 'failed', true, {columns}"
    site.change(f"{fields} {values} from webhook_deliveries where event_id = '{site.event_id}'")
    came = [
        Hook(event_id=row["event_id"], event_type=row["event_type"], job_id=json.loads(row["data"])["id"])
        for row in _deliveries(site)
    ]
    test = Hook(event_id="evt-test-1", event_type="fine_tuning.job.succeeded", job_id="ftjob-example")

    assert site.findings(Seen(hooks=[*came, test])) == []
    assert site.found(Seen(hooks=[*came, replace(test, event_id="evt-test-2")])) == {"I6"}


def test_two_trainers_of_one_job_are_found_after_more_than_a_lease(site: Site) -> None:
    def together(seconds: float) -> Seen:
        lost, claim = site.claim_ids
        first = Sighting(pid=1, claim_id=lost, first_at=0.0, last_at=100.0)
        return Seen(trainers=[first, Sighting(pid=2, claim_id=claim, first_at=100.0 - seconds, last_at=200.0)])

    assert site.found(together(LEASE + 9.0)) == set()
    assert site.found(together(LEASE + 11.0)) == {"I3"}


def test_folders_and_locks_without_an_owner_are_found(site: Site) -> None:
    (site.folder / "work" / "trainers" / "trainer-1").mkdir(parents=True)
    (site.folder / "work" / "workers").mkdir()
    (site.folder / "work" / "workers" / "w1.lock").touch()

    assert sorted(finding.subject for finding in site.findings()) == ["trainer-1", "w1.lock"]


def test_a_process_that_still_uses_the_work_folder_is_found(site: Site) -> None:
    argv = [sys.executable, "-c", "print(flush=True); input()", str(site.folder / "work" / "trainers" / "x")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()

        found = site.findings()

        child.kill()
    assert [finding.subject for finding in found] == [str(child.pid)]


def test_pending_work_is_not_a_finding_during_a_run(site: Site) -> None:
    site.change("update webhook_deliveries set status = 'pending'")

    assert site.findings(is_settled=False) == []


def _deliveries(site: Site) -> Iterator[Any]:
    engine = create_engine(site.url)
    with engine.connect() as connection:
        yield from connection.execute(text("select * from webhook_deliveries")).mappings().all()
    engine.dispose()
